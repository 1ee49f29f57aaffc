"Models of a few nodes with a card, for tests that need a model and not a good one"
import json
from pathlib import Path

import numpy as np

def _save(nodes, output, path, **card):
    import onnx
    from onnx import TensorProto, helper
    image = helper.make_tensor_value_info('image', TensorProto.FLOAT, [1, 3, 'h', 'w'])
    out = helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, 1, 'a', 'b'])
    scale = helper.make_tensor('scale', TensorProto.FLOAT, [1], np.array([8.], np.float32))
    model = helper.make_model(helper.make_graph(nodes, 'tiny', [image], [out], [scale]), opset_imports=[helper.make_opsetid('', 17)])
    model.ir_version = 8
    card = dict(mean=[.5]*3, std=[.5]*3, multiple=32, sigma=4, sha256='0'*64, threshold=.5) | card
    entry = model.metadata_props.add()
    entry.key, entry.value = 'card', json.dumps(card)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return Path(path)

def segmentation(path, **card):
    "Bright pixels are human"
    from onnx import helper
    nodes = [helper.make_node('ReduceMean', ['image'], ['m'], axes=[1]), helper.make_node('Mul', ['m', 'scale'], ['s']),
        helper.make_node('Sigmoid', ['s'], ['human'])]
    return _save(nodes, 'human', path, **(dict(task='segmentation', stride=1) | card))

def counting(path, **card):
    "Brightness above the middle, in people per cell"
    from onnx import helper
    nodes = [helper.make_node('ReduceMean', ['image'], ['m'], axes=[1]), helper.make_node('Relu', ['m'], ['r']),
        helper.make_node('AveragePool', ['r'], ['density'], kernel_shape=[8, 8], strides=[8, 8])]
    return _save(nodes, 'density', path, **(dict(task='counting', stride=8, threshold=.25) | card))
