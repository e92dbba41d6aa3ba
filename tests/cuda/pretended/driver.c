/* A CUDA driver without a GPU, for test_host_path.py: answers as one H200 would, keeps memory on the host, runs nothing
   and writes a line for each launch, so that the whole host path can be gone through with the real numba-cuda. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char context[64];
static __thread char *current; /* of this thread, as in a driver */
static int none(void) { return 0; }
static int refuses(const char *what) { /* what FASTBN_REFUSES names */
  const char *names = getenv("FASTBN_REFUSES");
  return names && strstr(names, what);
}
static void say(const char *what, void *f, unsigned x, unsigned y, unsigned threads, unsigned shared, void *stream) {
  printf("%s %p %u %u %u %u %p\n", what, f, x, y, threads, shared, stream);
  fflush(stdout);
}

int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { snprintf(s, n, "pretended"); return 0; }
int cuDeviceGetUuid_v2(char *u, int d) { memset(u, 7, 16); return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) {
  switch (a) {
    case 1: case 2: case 3: *v = 1024; break;
    case 8: *v = 49152; break;
    case 10: *v = 32; break;
    case 16: *v = 132; break;
    case 75: *v = 9; break;
    case 76: *v = 0; break;
    case 97: *v = 232448; break;
    default: *v = 1;
  }
  return 0;
}
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = context; return 0; }
int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { *f = 0; *a = 1; return 0; }
int cuCtxGetCurrent(void **c) { *c = current; return 0; }
int cuCtxSetCurrent(void *c) { current = c; return 0; }
int cuCtxPushCurrent_v2(void *c) { current = c; return 0; }
int cuCtxPopCurrent_v2(void **c) { if (c) *c = current; current = NULL; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuCtxSynchronize(void) { puts("synchronised"); return 0; }
int cuStreamSynchronize(void *s) { say("synchronised", NULL, 0, 0, 0, 0, s); return 0; }
int cuMemAlloc_v2(uint64_t *p, size_t n) { void *q; if (posix_memalign(&q, 512, n + 512)) return 2; *p = (uint64_t)q; return 0; }
int cuMemFree_v2(uint64_t p) { free((void *)p); return 0; }
int cuMemGetInfo_v2(size_t *f, size_t *t) { *f = *t = 1ul << 37; return 0; }
int cuMemcpyHtoD_v2(uint64_t d, const void *s, size_t n) { memcpy((void *)d, s, n); return 0; }
int cuMemcpyDtoH_v2(void *d, uint64_t s, size_t n) { memcpy(d, (void *)s, n); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t d, const void *s, size_t n, void *stream) { say("up", NULL, n, 0, 0, 0, stream); return cuMemcpyHtoD_v2(d, s, n); }
int cuMemcpyDtoHAsync_v2(void *d, uint64_t s, size_t n, void *stream) { say("down", NULL, n, 0, 0, 0, stream); return cuMemcpyDtoH_v2(d, s, n); }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { say("wait", NULL, 0, 0, 0, 0, stream); return 0; }
int cuLibraryLoadData(void **l) { *l = malloc(8); return 0; }
int cuLibraryGetKernel(void **k, void *l, const char *name) { *k = malloc(8); return 0; }
int cuKernelGetFunction(void **f, void *k) { *f = k; return 0; }
int cuKernelGetAttribute(int *v, int a, void *k, int d) { *v = a == 0 ? 1024 : a == 1 ? 4096 : 0; return 0; }
int cuKernelSetAttribute(int a, int v, void *k, int d) { say("attribute", k, a, v, 0, 0, NULL); return refuses("attribute"); }
/* What numba-cuda before 0.23 calls for the same. */
int cuModuleLoadDataEx(void **m, const void *image, unsigned n, void *options, void *values) { *m = malloc(8); return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = malloc(8); return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { return cuKernelGetAttribute(v, a, f, 0); }
int cuFuncSetAttribute(void *f, int a, int v) { return cuKernelSetAttribute(a, v, f, 0); }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { *n = 1; return 0; }
int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned t, unsigned ty, unsigned tz, unsigned shared,
                   void *stream, void **params, void **extra) {
  say("launch", f, x, y, t, shared, stream);
  return current ? 0 : 201;
}
int cuLaunchCooperativeKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned t, unsigned ty, unsigned tz,
                              unsigned shared, void *stream, void **params) {
  say("together", f, x, y, t, shared, stream);
  return refuses("together") ? 720 : current ? 0 : 201;
}
struct config { unsigned x, y, z, tx, ty, tz, shared; void *stream; struct { int id; char pad[4]; int value[16]; } *attributes; unsigned count; };
int cuLaunchKernelEx(const struct config *c, void *f, void **params, void **extra) { /* Numba's own launches */
  for (unsigned i = 0; i < c->count; i++)
    if (c->attributes[i].id == 2 && c->attributes[i].value[0])
      return cuLaunchCooperativeKernel(f, c->x, c->y, c->z, c->tx, c->ty, c->tz, c->shared, c->stream, params);
  return cuLaunchKernel(f, c->x, c->y, c->z, c->tx, c->ty, c->tz, c->shared, c->stream, params, extra);
}
int cuGetErrorName(int e, const char **s) { *s = "pretended"; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "pretended"; return 0; }
int cuGetProcAddress_v2(const char *name, void **p, int version, uint64_t flags, int *status) {
  char tried[256];
  snprintf(tried, sizeof tried, "%s_v2", name);
  *p = dlsym(RTLD_DEFAULT, tried);
  if (!*p) *p = dlsym(RTLD_DEFAULT, name);
  if (!*p) *p = (void *)none;
  if (status) *status = 0;
  return 0;
}
int cuGetProcAddress(const char *name, void **p, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, p, version, flags, NULL);
}
