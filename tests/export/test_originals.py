import onnx
import onnx_ir as ir
from fastbn_export.fold import fold
from fastbn_export.originals import originals
from fastbn_export.store import load
from onnx import helper

from .folding import Model, check


def model_with_details():
    """Untouched operators that say things which an editor need not keep: empty outputs, odd attributes, notes."""
    m = Model()
    x = m.input("N", 3, 6, 6)
    y = m.op("Relu", m.bn(m.op("Conv", x, m.weight(4, 3, 3, 3)), 4))
    y, _ = m.op("MaxPool", y, outputs=[m.name("t"), ""], kernel_shape=[2, 2])
    m.nodes[-1].doc_string = "kept"
    m.nodes[-1].metadata_props.add(key="a", value="b")
    m.infos.append(helper.make_tensor_value_info(y, 1, ["N", 4, 3, 3]))
    m.infos[-1].doc_string = "a pool"
    m.infos[-1].type.denotation = "IMAGE"
    return m.build(m.op("Sigmoid", y))


def test_what_is_not_touched_is_written_bit_for_bit():
    model = model_with_details()
    result = check(model)
    assert result.report.folded == 1
    assert list(result.model.graph.node)[-2:] == list(model.graph.node)[-2:]
    assert list(result.model.graph.value_info) == list(model.graph.value_info)
    assert list(result.model.graph.input) == list(model.graph.input)
    assert list(result.model.graph.output) == list(model.graph.output)


def test_changed_names_types_and_attributes_are_written_anew():
    _, edited = load(model_with_details())
    conv, _, relu, pool, _ = edited.graph
    relu.outputs[0].name = "renamed"
    conv.attributes.add(ir.AttrInt64("group", 1))
    pool.outputs[0].shape = ir.Shape(["N", 4, 3, 3])
    graph = onnx.GraphProto()
    originals(edited).graph(edited.graph, graph)
    assert graph.node[2].output[0] == graph.node[3].input[0] == "renamed"
    assert [a.name for a in graph.node[0].attribute] == ["group"]
    assert graph.value_info[-1].name == pool.outputs[0].name and graph.value_info[-1].type.denotation == "IMAGE"


def test_types_of_new_constants_are_not_stated_twice():
    model = model_with_details()
    result = fold(model)
    constants = {t.name for t in result.model.graph.initializer}
    assert not constants & {info.name for info in result.model.graph.value_info}
