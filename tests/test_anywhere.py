"Room 07's promises about files, sizes and shipped weights: no file runs code, bounded memory, one answer by torch and ONNX Runtime"

import numpy as np, pytest
from hypothesis import given, settings, strategies as st

onnx = pytest.importorskip('onnx')
from onnx import helper

from crowd_density import inference as inf
from crowd_density.inference import ModelError, files_of, load, model_path, regrid, update_card
from crowd_density.synthetic import scene
from test_inference import fresh, linux, picture, toy

@pytest.fixture(scope='module')
def shipped():
    try: return files_of('counting')
    except ModelError as e: pytest.skip(str(e))

# Files
def changed(path, change):
    m = onnx.load(toy(path))
    change(m.graph)
    path.write_bytes(m.SerializeToString())
    return path

def context(g): g.node.append(helper.make_node('EPContext', ['c'], ['z'], domain='com.microsoft', ep_cache_context='elsewhere.bin'))

def sparse(g): g.sparse_initializer.add().values.name = 'w2'

def listed(kind):
    def change(g):
        a = g.node[0].attribute.add(name='more')
        if kind == 'tensors': a.tensors.add().data_location = onnx.TensorProto.EXTERNAL
        elif kind == 'graphs': a.graphs.add().node.add(op_type='Relu', domain='evil.example')
        else: a.sparse_tensor.values.name = 'w2'
    return change

@pytest.mark.parametrize('change,words', [(context, 'compiled for a device'), (sparse, 'sparse'), (listed('tensors'), 'external data'),
                                          (listed('graphs'), 'foreign domain'), (listed('sparse'), 'sparse')])
def test_refuses_what_hides_in_a_graph(tmp_path, change, words):
    with pytest.raises(ModelError, match=words): load(changed(tmp_path/'m.onnx', change))

def test_graphs_without_end_are_refused_in_words(tmp_path):
    inner = b''
    for _ in range(3000): inner = inf._message(1, inf._message(5, inf._message(6, inner)))
    (tmp_path/'m.onnx').write_bytes(inf._message(7, inner))
    with pytest.raises(ModelError, match='damaged'): load(tmp_path/'m.onnx')

@pytest.mark.parametrize('card', [dict(mean='dark'), dict(mean=[.5]*2), dict(std=[.5, .5, 0]), dict(std=[.5, .5, None]), dict(stride=0.5), dict(stride=[8]),
                                  dict(stride=16, multiple=8), dict(multiple=30), dict(multiple='32')])
def test_impossible_cards_are_refused(tmp_path, card):
    with pytest.raises(ModelError, match='expected a card whose'): load(toy(tmp_path/'m.onnx', **card))

# Sizes
def dense(n, m, step, cell):
    "The oracle: what part of each old cell lies in each new one"
    new = -(-n // cell)
    a, b = np.arange(m)*step, np.minimum(np.arange(1, m+1)*step, n)
    lo, hi = np.arange(new)*cell, np.minimum(np.arange(1, new+1)*cell, n)
    o = np.clip(np.minimum(b[None], hi[:, None]) - np.maximum(a[None], lo[:, None]), 0, None)
    return o/o.sum(0)

@given(st.integers(1, 300), st.integers(1, 300), st.floats(2, 30), st.floats(2, 30), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_regrid_by_hand(h, w, sy, sx, seed):
    d = np.random.default_rng(seed).random((int(np.ceil(h/sy)), int(np.ceil(w/sx)))).astype(np.float32)
    np.testing.assert_allclose(regrid(d, (h, w), (sy, sx)), dense(h, d.shape[0], sy, 8) @ d @ dense(w, d.shape[1], sx, 8).T, rtol=1e-4, atol=1e-5)

@linux
@pytest.mark.parametrize('h,w', [(10000, 10000), (1000, 100000), (32, 1000000)])
def test_any_shape_in_bounded_memory(tmp_path, h, w):
    "A square of 100 megapixels, a panorama of as many, and a strip: the pixels and at most 450 MB"
    update_card(toy(tmp_path/'toy.onnx'), scale=dict(area=1300000, most=2.))
    used, size = fresh(f'''
        import json, numpy as np
        from crowd_density.inference import load
        e = load({str(tmp_path/'toy.onnx')!r}, threads=1).predict(np.full(({h}, {w}, 3), 90, np.uint8))
        print(json.dumps([peak(), e.density.shape]))''')
    assert size == [-(-h//8), -(-w//8)] and used <= h*w*3/1e6 + 450

# What ships
def test_what_ships_says_what_it_is(shipped):
    cards = [load(p).card if p.suffix == '.onnx' else inf._safe_card(p) for p in shipped]
    assert sum(p.stat().st_size for p in shipped) <= 28e6 and {p.suffix for p in shipped} == {'.onnx', '.safetensors'}
    assert len({c['sha256'] for c in cards}) == 1
    for c in cards: assert {'mean', 'std', 'stride', 'data', 'terms', 'licence', 'figures', 'scale', 'interval'} <= {k for k, v in c.items() if v}

def test_shipped_torch_and_onnx_agree(shipped):
    torch = pytest.importorskip('torch')
    from crowd_density.counting import CountingModel
    from crowd_density.segmentation import load_weights
    m, rgb = load('counting', threads=1, int8=False), scene(5, size_hw=(256, 320)).rgb
    net = CountingModel(m.card['encoder'], pretrained=False).eval()
    load_weights(model_path('counting').with_suffix('.safetensors'), net)
    with torch.inference_mode(): theirs = net(torch.from_numpy(m.blob(rgb)))[0, 0].numpy()
    ours = m.run(rgb)
    assert np.abs(ours - theirs).max() <= 1e-3*theirs.max() and abs(ours.sum() - theirs.sum()) <= 1e-3*theirs.sum()

@pytest.mark.parametrize('int8', [False, True])
def test_shipped_tiled_and_whole_agree(shipped, int8):
    try: m = load('counting', threads=1, int8=int8)
    except ModelError as e: pytest.skip(str(e))
    rgb = scene(5).rgb
    whole = m.predict(rgb, scale=1).count
    m.whole = m.budget = 2**18
    assert whole > 50 and abs(m.predict(rgb, scale=1).count - whole) <= .01*whole

def test_shipped_answers_alike_at_any_size(shipped):
    import cv2
    m, rgb = load('counting', threads=1), scene(5).rgb
    n = [m.predict(x).count for x in (cv2.resize(rgb, None, fx=.5, fy=.5, interpolation=cv2.INTER_AREA), rgb, cv2.resize(rgb, None, fx=2, fy=2))]
    assert max(n) <= 1.1*min(n)
    assert m.predict(picture(32, 32)).density.shape == (4, 4)
