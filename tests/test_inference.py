"Room 07: files that are refused, pictures of any size, the laws of tiles, maps and intervals"
import json, os, pickle, subprocess, sys, textwrap
from pathlib import Path

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

onnx = pytest.importorskip('onnx')
from onnx import TensorProto as T, helper, numpy_helper

from crowd_density import inference as inf
from crowd_density.data import DataError
from crowd_density.inference import (CELL, FEATURES, HEAT, Estimate, ModelError, features, finish_onnx, fit_interval, fit_like, interval, load,
                                     model_card, model_path, overlay, predict_files, quantise, regrid, says, stems, tile_map, tiles, unlike,
                                     update_card, working_scale, write_model_card)

ROOT = Path(__file__).parents[1]
rng = np.random.default_rng(0)

def toy(path, task='counting', domain='', external=False, pad=False, card=True, k=16, output=None, **more):
    "A model of one convolution: the density grows with darkness, the probability is a blur"
    out, n = output or inf.OUTPUTS.get(task, 'density'), k//2-4
    if task != 'segmentation' and task != 'autoencoder': w, b, conv, last = np.full((1, 3, k, k), -1/3/k**2), -.1, dict(strides=[8, 8], pads=[n]*4), 'Relu'
    else: w, b, conv, last = np.full((1, 3, 3, 3), -4/27), -1, dict(pads=[1]*4), 'Sigmoid'
    weights = [numpy_helper.from_array(np.float32(w), 'w'), numpy_helper.from_array(np.float32([b]), 'b')]
    if external: onnx.external_data_helper.set_external_data(weights[0], 'elsewhere.bin')
    nodes, first = [], 'image'
    if pad: # as timm's SAME padding comes out of torch's exporter
        nodes, first, conv['pads'] = [helper.make_node('Pad', ['image', 'p'], ['padded'])], 'padded', [0]*4
        weights.append(numpy_helper.from_array(np.array([0, 0, n, n, 0, 0, n, n]), 'p'))
    nodes += [helper.make_node('Conv', [first, 'w', 'b'], ['c'], kernel_shape=w.shape[2:], **conv), helper.make_node(last, ['c'], [out], domain=domain)]
    graph = helper.make_graph(nodes, 'toy', [helper.make_tensor_value_info('image', T.FLOAT, [1, 3, 'h', 'w'])],
                              [helper.make_tensor_value_info(out, T.FLOAT, [1, 1, 'a', 'b'])], weights)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid('', 17), *([helper.make_opsetid(domain, 1)] if domain else [])])
    if card: helper.set_model_props(model, {'card': json.dumps(dict(task=task, mean=[.5]*3, std=[.5]*3, stride=8, multiple=32, sha256='0'*64) | more)})
    Path(path).write_bytes(model.SerializeToString())
    return Path(path)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('models')

@pytest.fixture(scope='module')
def model(folder): return load(toy(folder/'toy.onnx'), threads=1)

def picture(h, w, seed=0):
    "Blobs, dark and light"
    r = np.random.default_rng(seed)
    return np.array(Image.fromarray(r.integers(0, 255, (max(h//12, 2), max(w//12, 2), 3), dtype=np.uint8)).resize((w, h)))

def safetensors_twin(path, sha=None):
    "A safetensors file with a card, written with numpy alone"
    st_numpy = pytest.importorskip('safetensors.numpy')
    import hashlib
    t = dict(a=np.arange(6, dtype=np.float16).reshape(2, 3), b=np.ones(3, np.float32))
    h = hashlib.sha256()
    for k in sorted(t): h.update(f'{k} {t[k].dtype} {t[k].shape}\n'.encode() + t[k].tobytes())
    st_numpy.save_file(t, path, metadata={'card': json.dumps(dict(task='counting', sha256=sha or h.hexdigest()))})
    return h.hexdigest()

# Files
def bad_file(path, kind):
    if kind == 'pickle': path.write_bytes(pickle.dumps(list(range(99))))
    if kind == 'torch': path.write_bytes(b'PK\x03\x04' + bytes(500))
    if kind == 'text': path.write_text('not a model at all\n'*20)
    if kind == 'empty': path.write_bytes(b'')
    if kind == 'zeros': path.write_bytes(bytes(4000))
    if kind == 'noise': path.write_bytes(np.random.default_rng(1).bytes(4000))
    if kind == 'png': Image.fromarray(picture(64, 64)).save(path, format='png')
    if kind == 'cut': path.write_bytes(toy(path).read_bytes()[:-100])
    if kind == 'no card': toy(path, card=False)
    if kind == 'other task': toy(path, task='weather')
    if kind == 'other output': toy(path, output='boxes')
    if kind == 'external': toy(path, external=True)
    if kind == 'domain': toy(path, domain='evil.example')
    if kind == 'altered':
        toy(path)
        update_card(path, note='stamped')
        b = bytearray(path.read_bytes())
        b[b.index(b'strides') - 60] ^= 4
        path.write_bytes(b)
    return path

KINDS = 'pickle torch text empty zeros noise png cut external domain altered'.split() + ['no card', 'other task', 'other output']

@pytest.mark.parametrize('kind', KINDS)
def test_refuses(tmp_path, kind):
    path = bad_file(tmp_path/'m.onnx', kind)
    with pytest.raises(ModelError, match='expected .*, found') as e: load(path)
    assert 'm.onnx' in str(e.value) and isinstance(e.value, DataError)

def test_missing_names(tmp_path):
    for name in ('nothing', tmp_path/'no.onnx', tmp_path): # a name, a file, a folder of no run
        with pytest.raises(ModelError, match='expected'): load(name)

@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_refused_in_words(tmp_path_factory, b):
    path = tmp_path_factory.getbasetemp()/'any.onnx'
    path.write_bytes(b)
    with pytest.raises(ModelError): load(path)
    path = path.with_suffix('.safetensors')
    path.write_bytes(b)
    with pytest.raises(ModelError): load(path)

@given(st.data())
@settings(max_examples=40, deadline=None)
def test_damaged_files_never_load_as_whole(tmp_path_factory, data):
    "Of a stamped file, a flipped bit in the graph is always noticed"
    path = tmp_path_factory.getbasetemp()/'stamped.onnx'
    toy(path)
    update_card(path)
    b = bytearray(path.read_bytes())
    graph = bytes(inf._envelope(path)[1])
    start = bytes(b).index(graph)
    i = data.draw(st.integers(start, start + len(graph) - 1))
    b[i] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(b)
    with pytest.raises(ModelError): load(path)

def test_twins(tmp_path):
    sha = safetensors_twin(tmp_path/'model.safetensors')
    with pytest.raises(ModelError, match='twin'): load(tmp_path/'model.safetensors')
    toy(tmp_path/'model.onnx', sha256=sha)
    assert load(tmp_path/'model.safetensors').task == load(tmp_path).task == 'counting'
    toy(tmp_path/'model.onnx', sha256='f'*64)
    with pytest.raises(ModelError, match='same weights'): load(tmp_path/'model.safetensors')
    safetensors_twin(tmp_path/'model.safetensors', sha='e'*64)
    with pytest.raises(ModelError, match='altered'): load(tmp_path/'model.safetensors')

@pytest.mark.parametrize('n', [0, 4, 8, 60, 100, -1])
def test_cut_safetensors(tmp_path, n):
    safetensors_twin(tmp_path/'a.safetensors')
    (tmp_path/'b.safetensors').write_bytes((tmp_path/'a.safetensors').read_bytes()[:n])
    with pytest.raises(ModelError, match='expected'): load(tmp_path/'b.safetensors')

def test_fingerprint_is_that_of_the_segmentation_room(tmp_path):
    "`inference` checks without torch what `segmentation` writes with it"
    torch = pytest.importorskip('torch')
    from crowd_density.segmentation import read_card, save_weights
    save_weights(tmp_path/'model.safetensors', dict(w=torch.randn(3, 4), b=torch.zeros(3), n=torch.tensor(7)), dict(task='counting'))
    assert inf._safe_card(tmp_path/'model.safetensors') == read_card(tmp_path/'model.safetensors')

def test_update_card(tmp_path):
    sha = safetensors_twin(tmp_path/'model.safetensors')
    toy(tmp_path/'model.onnx', sha256=sha)
    x, before = picture(64, 96), load(tmp_path).predict(picture(64, 96)).count
    for p in ('model.onnx', 'model.safetensors'): update_card(tmp_path/p, interval=dict(note='größer'))
    assert load(tmp_path/'model.safetensors').card['interval'] == dict(note='größer')
    from safetensors.numpy import load_file
    assert load_file(tmp_path/'model.safetensors')['a'].shape == (2, 3)
    onnx.checker.check_model(onnx.load(tmp_path/'model.onnx'))
    update_card(tmp_path/'model.onnx', interval=None)
    assert load(tmp_path).predict(x).count == before

def test_providers_are_never_replaced_in_silence(folder, model):
    with pytest.raises(ModelError, match='provider'): load(folder/'toy.onnx', providers=['NoSuchExecutionProvider'])
    assert load(folder/'toy.onnx', providers='cpu').session.get_providers() == ['CPUExecutionProvider']
    assert load(folder/'toy.onnx', threads=2).session.get_session_options().intra_op_num_threads == 2

class FakeRuntime:
    "ONNX Runtime of a machine with other providers; those in `broken` are listed and do not start, as CUDA without its libraries"
    def __init__(self, monkeypatch, available, broken=()):
        import onnxruntime
        real, self.asked = onnxruntime.InferenceSession, []
        class Session:
            def __init__(this, path, options, providers):
                self.asked.append(providers)
                this.real, this.started = real(path, options, providers=['CPUExecutionProvider']), [p for p in providers if p not in broken]
            def get_providers(this): return this.started if 'CPUExecutionProvider' in this.started else [*this.started, 'CPUExecutionProvider']
            def __getattr__(this, name): return getattr(this.real, name)
        monkeypatch.setattr(onnxruntime, 'InferenceSession', Session)
        monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: list(available))

ALL = 'CUDAExecutionProvider', 'OpenVINOExecutionProvider', 'CPUExecutionProvider'

@pytest.mark.parametrize('providers,asked', [(None, ALL[2:]), ('cuda', ALL[:1]), (['openvino', 'cpu'], ALL[1:]), (['CUDAExecutionProvider', 'cpu'], ALL[::2])])
def test_providers_are_chosen_by_name_and_in_order(folder, monkeypatch, providers, asked):
    fake = FakeRuntime(monkeypatch, ALL)
    m = load(toy(folder/'p.onnx'), providers=providers)
    assert fake.asked == [list(asked)] and m.session.get_providers()[0] == asked[0] and m.predict(picture(64, 64)).count >= 0

@pytest.mark.parametrize('available,providers,word', [(ALL[2:], 'cuda', 'CUDA'), (ALL[2:], ['cpu', 'openvino'], 'OpenVINO'), (ALL, 'cuda', 'CUDAExecutionProvider to start')])
def test_a_provider_that_is_missing_or_does_not_start_is_refused(folder, monkeypatch, available, providers, word):
    FakeRuntime(monkeypatch, available, broken=ALL[:1])
    with pytest.raises(ModelError, match=word): load(toy(folder/'p.onnx'), providers=providers)

# Tiles
sides = st.integers(1, 80).map(lambda n: 32*n)

@given(sides, sides, st.integers(2**17, 2**21), st.sampled_from([32, 64, 128]))
@settings(max_examples=150, deadline=None)
def test_tiles_cover_once_within_budget(h, w, budget, margin):
    seen = np.zeros((h//32, w//32), int)
    for (y0, y1, a, b), (x0, x1, c, d) in tiles((h, w), budget, margin):
        seen[a//32:b//32, c//32:d//32] += 1
        assert 0 <= y0 <= a < b <= y1 <= h and 0 <= x0 <= c < d <= x1 <= w and all(n % 32 == 0 for n in (y0, y1, a, b, x0, x1, c, d))
        assert (y1-y0)*(x1-x0) <= max(budget, (2*margin + 64)*max(int(budget**.5), 2*margin + 64))
        assert (a-y0 >= margin or y0 == 0) and (y1-b >= margin or y1 == h) and (c-x0 >= margin or x0 == 0) and (x1-d >= margin or x1 == w)
    assert (seen == 1).all() and len({(y[1]-y[0], x[1]-x[0]) for y, x in tiles((h, w), budget, margin)}) == 1

class Slow:
    "What `Model.run` does to a picture, without ONNX: darkness in 16 px windows, as the toy"
    stride, multiple, margin, whole, budget = 8, 32, 64, 10**9, 10**9
    def run(self, rgb):
        x = np.pad((.5 - rgb/255.).sum(2)*2, 4)
        return np.array([[max(x[i:i+16, j:j+16].mean()/3 - .1, 0) for j in range(0, x.shape[1]-8, 8)] for i in range(0, x.shape[0]-8, 8)], np.float32)

@given(st.integers(32, 300), st.integers(32, 300), st.integers(0, 99), st.sampled_from([.6, 1., 1., 1.5]))
@settings(max_examples=25, deadline=None)
def test_tiled_equals_whole_equals_slow(model, h, w, seed, scale):
    rgb = picture(h, w, seed)
    whole, size = tile_map(model, rgb, scale)
    assert whole.shape == tuple(-(-n//8) for n in size)
    was = model.whole, model.budget, model.margin
    try:
        model.whole, model.budget, model.margin = 2**14, 2**14, 32
        tiled, _ = tile_map(model, rgb, scale)
    finally: model.whole, model.budget, model.margin = was
    assert np.abs(tiled - whole).max() < (1e-5 if scale <= 1 else .02)
    assert abs(tiled.sum() - whole.sum()) <= .01*whole.sum() + 1e-3
    if scale == 1: np.testing.assert_allclose(whole, tile_map(Slow(), rgb, 1.)[0], atol=1e-4)

@given(st.integers(0, 99), st.booleans(), st.booleans())
@settings(max_examples=15, deadline=None)
def test_flips(model, seed, ud, lr):
    "A mirrored picture has the mirrored map (sides divisible by 32: nothing is padded)"
    rgb = picture(160, 224, seed)
    def flip(a): return a[::-1 if ud else 1, ::-1 if lr else 1]
    np.testing.assert_allclose(model.predict(np.ascontiguousarray(flip(rgb))).density, flip(model.predict(rgb).density), atol=1e-5)

def test_enlarged_beyond_four_megapixels_part_by_part(model):
    "Windows of a large enlargement and the enlargement of a whole agree"
    import cv2
    rgb = picture(1300, 1500)
    (h, w), cut = inf._scaled(rgb, 1.6)
    whole = cv2.resize(rgb, (w, h), interpolation=cv2.INTER_LINEAR)
    for y, x in (((0, 500), (0, 700)), ((900, h), (1200, w))): assert np.abs(cut(y, x).astype(int) - whole[slice(*y), slice(*x)]).max() <= 6
    np.testing.assert_allclose(model.predict(rgb, 1.6).count, model.predict(whole, 1).count, rtol=.01)

def test_padding_counts_nobody(folder):
    "A model that sees ten people in every cell: exactly the picture's own cells are summed"
    path = toy(folder/'ten.onnx')
    m = onnx.load(path)
    for t in m.graph.initializer: t.CopyFrom(numpy_helper.from_array(np.float32(numpy_helper.to_array(t)*0 + (10 if t.name == 'b' else 0)), t.name))
    onnx.save(m, path)
    for h, w in ((32, 32), (33, 95), (100, 130), (767, 513)):
        e = load(path).predict(picture(h, w))
        assert e.count == 10*(-(-h//8))*(-(-w//8)) and e.density.shape == (-(-h//8), -(-w//8))

@given(st.integers(32, 200), st.integers(32, 200), st.sampled_from([.4, .8, 1.3, 2.]), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_sum_is_the_count_at_any_scale(model, h, w, scale, seed):
    e = model.predict(picture(h, w, seed), scale=scale)
    assert e.density.shape == (-(-h//8), -(-w//8)) and e.cell == CELL and (e.density >= 0).all()
    assert abs(e.density.sum(dtype=float) - e.count) <= 1e-4*max(e.count, 1)

@given(st.integers(1, 300), st.integers(1, 300), st.floats(3, 25), st.floats(3, 25), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_regrid_keeps_everybody(h, w, sy, sx, seed):
    d = np.random.default_rng(seed).random((int(np.ceil(h/sy)), int(np.ceil(w/sx)))).astype(np.float32)
    new = regrid(d, (h, w), (sy, sx))
    assert new.shape == (-(-h//8), -(-w//8)) and (new >= 0).all() and abs(new.sum() - d.sum()) <= 1e-4*d.sum() + 1e-5

@pytest.mark.parametrize('shape,kind', [((31, 99, 3), 'uint8'), ((64, 64), 'uint8'), ((64, 64, 4), 'uint8'), ((64, 64, 3), 'float32'), ((0, 0, 3), 'uint8')])
def test_pictures_refused(model, shape, kind):
    bad = np.zeros(shape, kind)
    with pytest.raises(DataError, match='expected uint8'): model.predict(bad)

def test_views_of_arrays(model):
    rgb = picture(128, 160)
    assert abs(model.predict(rgb[:, ::-1]).count - model.predict(np.ascontiguousarray(rgb[:, ::-1])).count) < 1e-6

# Heads, masks
def test_heads_at_any_scale():
    d = np.zeros((30, 40), np.float32)
    d[4, 5] = d[20, 30] = 1
    for step in ((8, 8), (4., 4.), (12.5, 16)):
        e = Estimate(2., density=d, size_hw=(int(30*step[0]), int(40*step[1])), work=(d, step))
        np.testing.assert_allclose(e.heads(), [[5.5*step[1], 4.5*step[0]], [30.5*step[1], 20.5*step[0]]], rtol=1e-4)
    assert Estimate(size_hw=(64, 64)).heads().shape == (0, 2) and not Estimate(size_hw=(64, 64)).mask().any()

@given(st.integers(0, 99), st.floats(.1, 1))
@settings(max_examples=30, deadline=None)
def test_heads_lie_inside_and_are_no_more_than_people(seed, threshold):
    d = np.random.default_rng(seed).random((12, 17)).astype(np.float32)**4*3
    e = Estimate(density=d, size_hw=(90, 131))
    xy = e.heads(threshold)
    assert (xy >= 0).all() and (xy[:, 0] < 131).all() and (xy[:, 1] < 90).all() and len(xy) <= d.sum()/threshold + 1e-3

def test_a_full_cell_holds_several_heads():
    d = np.full((10, 10), .5, np.float32)
    d[4, 4] = 3
    e = Estimate(53.5, density=d, size_hw=(80, 80))
    assert abs(len(e.heads()) - d.sum()) <= .15*d.sum()

def test_equal_neighbours_make_one_head():
    d = np.zeros((12, 12), np.float32)
    d[4:6, 4:6] = .25
    np.testing.assert_allclose(Estimate(density=d, size_hw=(96, 96)).heads(), [[40, 40]], atol=1e-3)

# Intervals
counts = st.lists(st.tuples(st.floats(0, 3000), st.floats(0, 3000)), min_size=2, max_size=80)

@given(counts, st.sampled_from([.5, .8, .9]), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_interval_covers_what_it_was_fitted_on(pairs, level, groups):
    "The coverage law: of every third of the pictures it was fitted on, at least `level` lie inside"
    t, p = np.array(pairs).T
    rule = json.loads(json.dumps(fit_interval(t, p, level, groups=groups)))
    lo, hi = np.array([interval(rule, x) for x in p]).T
    assert (lo <= p).all() and (p <= hi).all() and (lo >= 0).all()
    tol = 1e-6*(t + 1)
    inside = (lo - tol <= t) & (t <= hi + tol)
    for i in inf._thirds(np.log(p + rule['offset']).round(6), min(groups, len(t)//2)): assert inside[i].mean() >= level - 1e-9

def test_interval_covers_fresh_pictures():
    def draw(n, r):
        t = np.exp(r.uniform(1, 7, n))
        return t, t*np.exp(r.normal(0, .4, n)*np.exp(-np.log(t)/7))
    inside = []
    for seed in range(20):
        r = np.random.default_rng(seed)
        rule = fit_interval(*draw(110, r))
        t, p = draw(300, r)
        lo, hi = np.array([interval(rule, x) for x in p]).T
        inside.append([((lo <= t) & (t <= hi))[i].mean() for i in np.array_split(np.argsort(t), 3)])
    assert (np.mean(inside, 0) > .76).all() and (np.mean(inside, 0) < .92).all()

@given(st.floats(0, 5000), st.floats(0, 20), st.floats(0, 20))
@settings(max_examples=60, deadline=None)
def test_unlike_widens(count, a, b):
    rule = fit_interval(np.arange(1, 60), np.arange(1, 60)[::-1])
    (l0, h0), (l1, h1) = interval(rule, count, min(a, b)), interval(rule, count, max(a, b))
    assert 0 <= l1 <= l0 <= count <= h0 <= h1 and np.isfinite(h1)
    assert interval(None, count) == (None, None) and interval({}, count) == (None, None)

@given(st.integers(20, 80), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_quantiles_are_calibrated_not_cautious(n, seed):
    "Of one value left out in turn, the share that lies between the others' bounds is the level, to a rank or two"
    r = np.random.default_rng(seed).normal(size=n)
    inside = [lo <= x <= hi for i, x in enumerate(r) for lo, hi in [inf._quantiles(np.delete(r, i), .8)]]
    assert abs(np.mean(inside) - .8) <= 3/n

@pytest.mark.parametrize('t,p', [([1], [1]), ([1, 2, 3], [1, 2]), ([1, np.nan], [1, 2]), ([], [])])
def test_interval_needs_pairs(t, p):
    with pytest.raises(ValueError, match='expected two or more'): fit_interval(t, p)

def test_unlike_pictures():
    known = np.array([features(picture(96, 128, s), np.zeros((12, 16), np.float32)) for s in range(40)])
    like = json.loads(json.dumps(fit_like(known)))
    assert known.shape[1] == len(FEATURES) == len(like['mean'])
    assert np.mean([unlike(like, x) <= 1 for x in known]) >= .9
    assert unlike(like, features(np.zeros((96, 128, 3), np.uint8), np.zeros((12, 16), np.float32))) > 2
    assert unlike(None, known[0]) == 0

def test_predict_gives_the_interval(tmp_path):
    path = toy(tmp_path/'a.onnx')
    known = [picture(96, 128, s) for s in range(30)]
    m = load(path)
    e = [m.predict(x) for x in known]
    p = np.array([x.count for x in e])
    update_card(path, interval=fit_interval(p*1.1, p, like=[features(x, y.density) for x, y in zip(known, e)]))
    usual, odd = load(path).predict(picture(96, 128, 77)), load(path).predict(np.zeros((96, 128, 3), np.uint8))
    assert usual.low <= usual.count <= usual.high and usual.unlike < odd.unlike
    assert (odd.high - odd.low)/odd.count > (usual.high - usual.low)/usual.count

# Scale
@given(st.integers(32, 9000), st.integers(32, 9000))
def test_working_scale(h, w):
    rule = dict(area=800000, most=2.)
    s = working_scale(rule, (h, w))
    assert 0 < s <= 2 and (s == 2 or s == 1 or abs(s*s*h*w/800000 - 1) < 1e-6) and (s != 1 or abs(h*w/800000 - 1) < .05)
    assert working_scale(None, (h, w)) == working_scale({}, (h, w)) == 1

def scale_rows(best, n=40, seed=0):
    "Pictures that are counted right at the area `best`, too low elsewhere"
    r = np.random.default_rng(seed)
    looks = (500000, 2), (1000000, 2), (2000000, 2)
    return [dict(part='A', size=1, pixels=10**6, true=float(t), counts={v: t*(1 - .3*abs(np.log(v[0]/best))) for v in looks}, crowding=dict.fromkeys(looks, t/500))
            for t in r.integers(5, 999, n)]

@pytest.mark.parametrize('best', [500000, 1000000, 2000000])
def test_choose_scale(best):
    rule = json.loads(json.dumps(inf.choose_scale(scale_rows(best))))
    assert rule['area'] == best and rule['finer'] is None and rule['error'] < 1e-9

def test_finer_look_only_where_it_is_crowded(tmp_path):
    path = toy(tmp_path/'a.onnx')
    update_card(path, scale=dict(area=160*224, most=2., finer=dict(crowding=.3, area=4*160*224, most=2.)))
    m = load(path)
    pale, dark = np.full((160, 224, 3), 110, np.uint8), np.zeros((160, 224, 3), np.uint8)
    assert inf.crowding(m.predict(pale, 1).density) < .3 < inf.crowding(m.predict(dark, 1).density)
    assert (m.predict(pale).scale, m.predict(dark).scale, m.predict(dark, scale=1).scale) == (1, 2, 1)
    half = np.ascontiguousarray(dark[::2, ::2])
    assert m.predict(half).scale == 2 # no more than `most`

def test_a_peek_decides_the_only_look(tmp_path):
    "Crowded or not, the picture goes through the network once more after the peek, and the answer is that of the scale taken"
    path = toy(tmp_path/'a.onnx')
    rule = dict(area=160*224, most=2., peek=dict(area=40*56, most=2.), finer=dict(crowding=.3, area=4*160*224, most=2.))
    update_card(path, scale=rule)
    m, looked = load(path), []
    run = m.run
    m.run = lambda rgb: looked.append(rgb.shape[:2]) or run(rgb)
    pale, dark = np.full((160, 224, 3), 110, np.uint8), np.zeros((160, 224, 3), np.uint8)
    for rgb, scale, size in ((pale, 1, (160, 224)), (dark, 2, (320, 448))):
        looked.clear()
        e = m.predict(rgb)
        assert e.scale == scale and looked == [(64, 64), size]
        assert e.count == m.predict(rgb, scale=scale).count
    update_card(path, scale={**rule, 'peek': None})
    assert [load(path).predict(x).scale for x in (pale, dark)] == [1, 2]

def slow_rule_error(rows, looks, rule):
    "The error of a rule picture by picture, as the oracle of the tables"
    first, sparse, cut, dense = rule
    parts, cost = {}, []
    for r in rows:
        last = looks[dense if r['crowding'][looks[first]] > cut else sparse]
        spent = [last] if last == looks[first] else [looks[first], last]
        cost.append(sum(min(a, m*m*r['pixels'])/1e6 for a, m in spent))
        parts.setdefault((r['part'], r['size']), []).append((abs(r['true'] - r['counts'][last]), r['true']))
    return np.mean([sum(a for a, _ in v)/max(sum(t for _, t in v), len(v)) for v in parts.values()]), np.mean(cost)

@given(st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_rule_error_is_the_slow_one(seed):
    r = np.random.default_rng(seed)
    looks = sorted([(75000, 2.), (600000, 1.2), (1400000, 2.)])
    rows = [dict(part='AB'[r.integers(2)], size=int(r.integers(1, 3)), pixels=int(r.integers(10**4, 10**6)), true=float(r.integers(0, 99)),
                 counts={v: r.uniform(0, 99) for v in looks}, crowding={v: r.random() for v in looks}) for _ in range(20)]
    columns = inf._columns(rows, looks)
    rules = list(inf._rules(looks, columns[3]))
    for rule in rules: np.testing.assert_allclose(inf._rule_error(columns, rule), slow_rule_error(rows, looks, rule), rtol=1e-9)
    best = inf.choose_scale(rows, worth=0, plain=0)['error']
    assert abs(best - min(slow_rule_error(rows, looks, x)[0] for x in rules)) < 1e-4
    assert all(x[1] != 0 and x[3] != 0 for x in rules) # nothing is counted by a peek

def test_choose_scale_peeks_where_that_is_cheaper():
    "Dense pictures need the fine look; a peek tells them, and costs less than a whole first look"
    looks = (75000, 2), (600000, 2), (1400000, 2)
    rows = [dict(part='A', size=1, pixels=10**6, true=float(t), counts={v: t*(1 if v[0] == (1400000 if t > 200 else 600000) else .5) for v in looks},
                 crowding=dict.fromkeys(looks, t/500)) for t in range(5, 400, 5)]
    rule = inf.choose_scale(rows)
    assert (rule['peek'], rule['area'], rule['finer']['area']) == (dict(area=75000, most=2), 600000, 1400000) and rule['error'] < .05

class Thing:
    "An item of a data set"
    part = 'A'
    def __init__(self, seed): self.seed = seed
    def rgb(self): return picture(96, 128, self.seed)
    def count(self): return 10 + self.seed

def test_fit_scale(model):
    rule = inf.fit_scale(model, [Thing(s) for s in range(6)], looks=((96*128, 2), (2*96*128, 2)), sizes=(.5, 1))
    assert rule['n'] == 12 and rule['area'] in (96*128, 2*96*128) and json.dumps(rule)

@given(arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.floats(0, 50, width=32)), *[st.floats(0, 1)]*3, st.floats(.1, 4))
def test_a_correction_adds_at_most_its_slope_and_nothing_where_few_stand(density, slope, free, enlarged, scale):
    rule = dict(slope=slope, free=free, half=.03, window=33)
    new = inf.corrected(rule, density)
    less = inf.corrected(dict(rule, enlarged=enlarged), density, scale)
    assert np.allclose(less*max(scale, 1)**enlarged, new, rtol=1e-4) and np.array_equal(inf.corrected(rule, density, scale), new)
    assert new.shape == density.shape and new.dtype == np.float32 and inf.corrected(None, density) is density
    assert (new >= density*(1 - 1e-5)).all() and (new <= density*(1 + slope)*(1 + 1e-5)).all()
    if density.max() <= free: assert np.array_equal(new, density)

@pytest.mark.parametrize('feigned,real,most,own,expected', ((10, 0, 3., (192, 256), 0), (10, 4, 3., (192, 256), 4), (10, 6, 3., (192, 256), 10), (40, 0, 3., (192, 256), 40),
                                                            (10, 0, 1.2, (192, 256), 10), (10, 0, 3., (96, 400), 10)))
def test_few_people_must_be_seen_at_the_pictures_own_size_too(tmp_path, feigned, real, most, own, expected):
    rule = inf.fit_interval(np.arange(1, 40.), np.arange(1, 40.)*1.1)
    m = load(toy(tmp_path/'a.onnx', scale=dict(area=3*10**6, most=most), interval=rule))
    def run(rgb):
        h, w = (n//8 for n in rgb.shape[:2])
        return np.full((h, w), (real if rgb.shape[0] <= own[0] + 31 else feigned)/(h*w), np.float32)
    m.run = run
    e = m.predict(picture(*own, 0))
    fell = expected == real and real != feigned
    assert e.count == pytest.approx(expected, rel=.15) and e.scale == (1 if fell else most)
    assert e.density.sum() == pytest.approx(e.count, rel=1e-3) and e.density.shape == tuple(-(-n//8) for n in own)
    assert e.high >= (feigned*.9 if fell else e.count)
    assert m.predict(picture(*own, 0), scale=3.).count == pytest.approx(feigned, rel=.1)

def test_predict_corrects_the_map_and_the_count(tmp_path):
    plain, other = load(toy(tmp_path/'a.onnx')), load(toy(tmp_path/'b.onnx', correction=dict(slope=.5, free=0, half=.001, window=3)))
    rgb = picture(96, 128, 0)
    a, b = plain.predict(rgb), other.predict(rgb)
    assert a.count < b.count <= 1.5*a.count and b.density.sum() == pytest.approx(b.count, rel=1e-4)

@pytest.mark.parametrize('wrong', (dict(slope=2), dict(half=0), dict(slope=float('nan')), dict(window=None), dict(slope='.1'),
                                   dict(window=0), dict(enlarged=-.1), dict(enlarged='1'), dict(enlarged=True), dict(enlarged=float('inf'))))
def test_an_impossible_correction_is_named(tmp_path, wrong):
    rule = dict(slope=.1, free=0, half=.1, window=3) | wrong
    with pytest.raises(ModelError, match='slope of 0 to 1'): load(toy(tmp_path/'a.onnx', correction=rule))

@given(arrays(np.float64, st.tuples(st.integers(1, 30), st.just(9)), elements=st.floats(-20, 20)), st.floats(.8, 1.25),
       arrays(np.float64, 9, elements=st.floats(-1e3, 1e3)))
def test_a_cameras_gain_is_whole_on_its_pictures_and_between_1_and_itself_elsewhere(x, gain, other):
    rule = json.loads(json.dumps(inf.fit_own(gain, x)))
    assert all(inf.own_factor(rule, o) == pytest.approx(gain) for o in x)
    assert min(gain, 1) - 1e-9 <= inf.own_factor(rule, other) <= max(gain, 1) + 1e-9

def test_predict_gives_a_camera_its_gain(tmp_path):
    plain, rgbs = load(toy(tmp_path/'a.onnx')), [picture(96, 128, s) for s in range(3)]
    seen = [plain.predict(x) for x in rgbs]
    rule = inf.fit_own(1.2, [features(x, e.density) for x, e in zip(rgbs, seen)])
    own = load(toy(tmp_path/'b.onnx', own=rule))
    for x, e in zip(rgbs, seen):
        got = own.predict(x)
        assert got.count == pytest.approx(1.2*e.count, rel=1e-4) and got.density.sum() == pytest.approx(got.count, rel=1e-4)
    white = np.full((96, 128, 3), 255, np.uint8)
    assert own.predict(white).count == plain.predict(white).count

@pytest.mark.parametrize('wrong', (dict(gain=9), dict(gain='1'), dict(mean=[0]*8), dict(deviation=[0]*7), dict(far=0), dict(mean=None),
                                   dict(deviation=[1] + [float('nan')]*6), dict(far=float('inf')), dict(mean=[[0]*7]*7), dict(far=10**400), dict(mean=[[0], 0])))
def test_an_impossible_own_camera_is_named(tmp_path, wrong):
    rule = inf.fit_own(1.1, np.zeros((2, 9))) | wrong
    with pytest.raises(ModelError, match='own camera'): load(toy(tmp_path/'a.onnx', own=rule))

def test_settle_writes_all_files(tmp_path):
    sha = safetensors_twin(tmp_path/'model.safetensors')
    toy(tmp_path/'model.onnx', sha256=sha)
    quantise(tmp_path/'model.onnx', [picture(96, 128, s) for s in range(3)])
    said = inf.settle(tmp_path, [Thing(s) for s in range(8)], looks=((96*128, 2), (2*96*128, 2)))
    assert [p.name for p in inf.files_of(tmp_path)] == ['model.onnx', 'model.int8.onnx', 'model.safetensors']
    for m in (load(tmp_path, int8=False), load(tmp_path, int8=True), load(tmp_path/'model.safetensors')):
        assert m.card['interval'] == json.loads(json.dumps(said['interval'])) and m.card['scale']['area'] == said['scale']['area']
    e = load(tmp_path).predict(Thing(99).rgb())
    assert e.low <= e.count <= e.high and e.unlike > 0
    loss = load(tmp_path, int8=True).card['int8']
    off = {k: np.mean([abs(load(tmp_path, int8=k == 'int8').predict(Thing(s).rgb()).count - Thing(s).count()) for s in range(8)]) for k in ('float', 'int8')}
    assert loss == said['int8'] if loss['default'] else said['int8'] is None
    assert all(load(tmp_path, int8=k).card['correction'] == said['correction'] for k in (False, True)) and said['correction']['n'] == 16
    assert loss['tune']['A'] == dict(n=8, mae_float=round(off['float'], 3), mae_int8=round(off['int8'], 3))
    assert (load(tmp_path).card.get('bits') == 8) == loss['default'] == (off['int8'] <= 1.02*off['float'])

@pytest.mark.parametrize('low,gain', [(.9, 1.), (.97, 1.02), (.5, 1.)])
def test_levelled_makes_the_copy_count_like_the_original(low, gain):
    "What 8 bits lose on average is given back, within bounds, without knowing how many people there are"
    class Fake:
        def __init__(self, share): self.share, self.gain = share, gain
        def predict(self, rgb): return Estimate(count=float(rgb.sum())*self.share)
    pictures = [np.full((32, 32, 3), k, np.uint8) for k in range(1, 9)]
    assert inf.levelled(Fake(1.), Fake(low), pictures) == pytest.approx(min(gain/low, 1.25), abs=1e-3)

@pytest.mark.parametrize('worse,default', [(1., True), (1.019, True), (1.03, False), (1.5, False)])
def test_int8_is_the_default_only_if_little_is_lost(tmp_path, monkeypatch, worse, default):
    class Fake:
        def __init__(self, int8): self.off = worse if int8 else 1.
        def predict(self, rgb): return Estimate(count=float(rgb[0, 0, 0]) + 10*self.off)
    monkeypatch.setattr(inf, 'load', lambda path, threads, int8: Fake(int8))
    class Item:
        def __init__(self, n, part): self.n, self.part = n, part
        def rgb(self): return np.full((32, 32, 3), self.n, np.uint8)
        def count(self): return self.n
    loss = inf.int8_loss('any', [Item(n, p) for n in (20, 40) for p in 'AB'])
    assert loss == dict(default=default, tune={p: dict(n=2, mae_float=10., mae_int8=10*worse) for p in 'AB'})

def test_coverage_counts():
    from scipy.stats import binomtest
    t = np.arange(30.)
    c = inf.coverage(t, t - 1, np.where(t % 5 == 0, t - .5, t + 1))
    assert c['all']['n'] == 30 and abs(c['all']['inside'] - .8) < 1e-9 and abs(c['sparse']['inside'] - .8) < 1e-9 and c['dense']['n'] == 10
    for k in c: np.testing.assert_allclose(c[k]['binomial'], binomtest(round(.8*c[k]['n']), c[k]['n']).proportion_ci(), atol=1e-9)

# Other tasks
@pytest.mark.parametrize('h,w', [(32, 32), (77, 130), (300, 401)])
def test_segmentation(tmp_path, h, w):
    m = load(toy(tmp_path/'s.onnx', 'segmentation', threshold=.3, share=dict(slope=2., intercept=-.1)))
    e = m.predict(picture(h, w))
    assert e.human.shape == e.mask().shape == (h, w) and e.count is None and e.density is None and e.heads().shape == (0, 2)
    assert ((e.human >= .3) == e.mask()).all() and 0 <= e.share <= 1
    assert abs(e.share - np.clip(2*e.human.mean(dtype=float) - .1, 0, 1)) < 1e-6
    assert m.predict(picture(h, w), scale=1.5).human.shape == (h, w)

def test_a_segmentation_model_looks_as_often_as_its_card_says(tmp_path, monkeypatch):
    from crowd_density.preprocessing import three_looks
    rgb, settings = picture(150, 200), dict(window=64, nobody=.15, packed=.8)
    once, m = load(toy(tmp_path/'a.onnx', 'segmentation')), load(toy(tmp_path/'b.onnx', 'segmentation', looks=settings))
    want = three_looks(lambda x: once.predict(x).human, rgb, **settings)
    np.testing.assert_allclose(m.predict(rgb).human, want, atol=2e-3)
    assert np.abs(m.predict(rgb).human.astype(float) - once.predict(rgb).human).max() > .01
    assert (m.predict(rgb, scale=1).human == once.predict(rgb).human).all() # a scale of one's own is one look
    sizes, run = [], m.run
    monkeypatch.setattr(m, 'run', lambda x: sizes.append(x.shape[0]*x.shape[1]) or run(x))
    big = np.tile(rgb[:128, :128], (32, 32, 1))
    assert m.predict(big).human.shape == big.shape[:2] and sum(sizes) <= 2.25*1.5*inf.LARGE

def test_segmentation_tiles(tmp_path):
    m = load(toy(tmp_path/'s.onnx', 'segmentation'))
    whole = m.predict(picture(300, 500)).human
    m.whole, m.budget, m.margin = 2**15, 2**15, 32
    assert np.abs(m.predict(picture(300, 500)).human - whole).max() < 1e-3

def test_large_pictures_are_segmented_at_a_megapixel(tmp_path):
    "24 megapixels take the work of less than one, margins of tiles included at most of one and a half, and come back at their own size; up to a megapixel a picture stays as it is"
    m = load(toy(tmp_path/'s.onnx', 'segmentation'))
    run, seen = m.run, []
    m.run = lambda rgb: seen.append(rgb.shape[0]*rgb.shape[1]) or run(rgb)
    big = np.ascontiguousarray(np.tile(picture(200, 300), (20, 20, 1)))
    e = m.predict(big)
    assert e.human.shape == e.mask().shape == (4000, 6000) and sum(seen) <= 1.5*inf.LARGE and abs(e.scale**2*big[..., 0].size/inf.REDUCED - 1) < .01
    assert m.predict(picture(1000, 1000)).scale == 1

def test_autoencoder(tmp_path):
    e = load(toy(tmp_path/'a.onnx', 'autoencoder', size=[128, 128])).predict(picture(100, 170))
    assert e.heat.shape == (128, 128) and e.density.shape == (13, 22)
    assert abs(e.count - np.maximum(e.heat, 0).sum()/HEAT) < 1e-3*e.count and abs(e.density.sum() - e.count) < 1e-3*e.count

# Files in, files out
def test_predict_files_goes_on(model, tmp_path):
    for d in 'ab': (tmp_path/d).mkdir()
    names = ['a/x.jpg', 'b/x.jpg', 'a/x.png', 'a/ä ö.png', 'a/y.png']
    for i, n in enumerate(names): Image.fromarray(picture(60, 90, i)).save(tmp_path/n)
    (tmp_path/'a'/'text.jpg').write_text('text')
    (tmp_path/'a'/'empty.jpg').write_bytes(b'')
    (tmp_path/'a'/'cut.jpg').write_bytes((tmp_path/'a'/'x.jpg').read_bytes()[:900])
    Image.fromarray(picture(20, 90)).save(tmp_path/'a'/'small.png')
    files = [tmp_path/n for n in (*names[:2], 'a/text.jpg', 'a/empty.jpg', 'a/cut.jpg', 'a/small.png', 'a/missing.jpg', *names[2:])]
    lines = list(predict_files(model, files, tmp_path/'o', tmp_path/'m', tmp_path/'k'))
    assert [x['file'] for x in lines] == [str(f) for f in files]
    assert [x['error'] is None for x in lines] == [True]*2 + [False]*5 + [True]*3
    assert all(set(x) == {'file', 'count', 'low', 'high', 'share', 'seconds', 'error'} for x in json.loads(json.dumps(lines)))
    assert all(x['count'] is None and x['seconds'] is None for x in lines if x['error'])
    for d, ext in (('o', 'jpg'), ('m', 'npy'), ('k', 'png')): assert len(list((tmp_path/d).iterdir())) == 5 == len(list((tmp_path/d).glob(f'*.{ext}')))
    mask = np.array(Image.open(tmp_path/'k'/'y.png'))
    assert mask.shape == (60, 90) and set(np.unique(mask)) <= {0, 255}

def test_unwritable_output_is_named(model, tmp_path):
    Image.fromarray(picture(60, 90)).save(tmp_path/'x.png')
    (tmp_path/'o').write_text('a file where a folder should be')
    line, = predict_files(model, [tmp_path/'x.png'], overlays=tmp_path/'o')
    assert line['error'] and line['count'] is not None and (tmp_path/'o').read_text().startswith('a file')

names = st.lists(st.tuples(st.sampled_from('abA'), st.sampled_from(['x', 'X', 'y', 'x_jpg', 'a_x_jpg', 'x_2']), st.sampled_from(['jpg', 'png', 'JPG'])), max_size=12)

@given(names)
def test_stems_never_clash(parts):
    files = [f'{d}/{n}.{e}' for d, n, e in parts]
    out = stems(files)
    assert len(out) == len(files) and len({s.lower() for s in out}) == len(out)

def test_predict_many(model, tmp_path):
    Image.fromarray(picture(60, 90)).save(tmp_path/'x.png')
    a, b, c, d = model.predict_many([picture(60, 90), np.zeros((4, 4), np.uint8), tmp_path/'x.png', tmp_path/'no.png'])
    assert a.count == c.count and a.error is None and b.count is None and 'expected' in b.error and 'no.png' in d.error

@pytest.mark.parametrize('h,w', [(32, 32), (60, 90), (40, 3000)])
def test_overlay(model, h, w):
    rgb = picture(h, w)
    for e in (model.predict(rgb), Estimate(share=.5, human=np.full((h, w), .5, np.float16), size_hw=(h, w)), Estimate(error='no signal', size_hw=(h, w))):
        view = overlay(rgb, e)
        assert view.dtype == np.uint8 and view.shape == ((h, w, 3) if w < 2049 else (round(h*2048/w), 2048, 3))
    assert (rgb == picture(h, w)).all() and 'unknown' in says(e)

# Graphs
def test_finish_and_quantise(tmp_path):
    path, rgb = toy(tmp_path/'a.onnx', pad=True), picture(256, 320)
    before = load(path).predict(rgb).density
    card = finish_onnx(path)
    assert [n.op_type for n in onnx.load(path).graph.node] == ['Conv', 'Relu'] and len(onnx.load(path).graph.initializer) == 2
    np.testing.assert_array_equal(load(path).predict(rgb).density, before)
    assert finish_onnx(path) == card
    with pytest.raises(ModelError, match='quantise'): load(path, int8=True)
    quantise(path, [picture(128, 128, s) for s in range(4)])
    small = load(path, int8=True)
    assert small.card['bits'] == 8 and abs(small.predict(rgb).count - before.sum()) < .05*before.sum() and .8 <= small.gain <= 1.25
    assert load(path).card.get('bits') is None
    update_card(tmp_path/'a.int8.onnx', int8=dict(default=True))
    assert load(path).card['bits'] == 8 and load(path, int8=False).card.get('bits') is None
    (tmp_path/'a.int8.onnx').rename(tmp_path/'b.int8.onnx')
    assert load(path).card.get('bits') is None # the default asks for a copy that is there
    (tmp_path/'b.int8.onnx').rename(tmp_path/'a.int8.onnx')
    toy(path, sha256='1'*64)
    with pytest.raises(ModelError, match='a copy of'): load(path, int8=True)

# The card
def test_model_card(tmp_path):
    path = toy(tmp_path/'a.onnx')
    update_card(path, data='pictures | of people', figures=dict(valid=dict(B=dict(mae=8.4, rmse=14., constant=72.)), n=5), failures=dict(black=dict(people=3.)),
                interval=fit_interval(np.arange(9), np.arange(9)), licence='research')
    text = write_model_card(tmp_path/'MODEL_CARD.md', [path]).read_text(encoding='utf-8')
    for s in ('| B | 8.4 | 14 | 72 |', '| black | 3 |', 'pictures \\| of people', 'safety alone', 'fine-tune', '80%', 'research'): assert s in text, s
    assert model_card({}) and model_card(dict(task='segmentation', figures={})) # says what is missing

def test_shipped_card_is_that_of_the_shipped_weights():
    folder = ROOT/'crowd_density'
    models = sorted((folder/'weights').glob('*.onnx')) if (folder/'weights').is_dir() else []
    if not models: pytest.skip('no weights ship yet')
    text = (folder/'MODEL_CARD.md').read_text(encoding='utf-8')
    for m in models:
        if '.int8' not in m.name: assert load(m).card['sha256'] in text

# Cold start and memory, in processes of their own. (getrusage would not do: a child inherits the peak of the process that started it)
PEAK = "peak = lambda: next(int(s.split()[1])/1e3 for s in open('/proc/self/status') if s.startswith('VmHWM'))\n"
linux = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peak memory is read from /proc')

def fresh(code, **env):
    "Run `code` in a new Python; what it prints last, as JSON"
    r = subprocess.run([sys.executable, '-c', PEAK + textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT), **env})
    assert r.returncode == 0, r.stderr[-2000:]
    return json.loads(r.stdout.splitlines()[-1])

def test_no_torch_and_light_import():
    loaded = fresh('import sys, json, crowd_density.inference\nprint(json.dumps(sorted({m.split(".")[0] for m in sys.modules})))')
    assert not {'torch', 'torchvision', 'fastai', 'timm', 'sklearn', 'matplotlib', 'onnx', 'pandas', 'onnxruntime'} & set(loaded)

@linux
@pytest.mark.parametrize('name', ['counting', 'segmentation'])
def test_big_picture_with_shipped_weights(name):
    "8000x6000 in at most 600 MB, the picture's own 144 included"
    try: load(name)
    except ModelError as e: pytest.skip(str(e))
    used = fresh(f'''
        import json, numpy as np
        from crowd_density.inference import load
        m = load({name!r}, threads=2)
        rgb = np.zeros((6000, 8000, 3), np.uint8)
        rgb[::3] = 90
        e = m.predict(rgb)
        print(json.dumps([peak(), list((e.density if e.human is None else e.human).shape)]))''')
    assert used[0] <= 600 and used[1] == ([750, 1000] if name == 'counting' else [6000, 8000]), used

@linux
def test_big_picture_in_bounded_memory(folder, model):
    "8000x6000: the picture's 144 MB and not much more; the float map of the whole would be 576 MB"
    used = fresh(f'''
        import json, numpy as np
        from crowd_density.inference import load
        m = load({str(folder/'toy.onnx')!r}, threads=1)
        rgb = np.zeros((6000, 8000, 3), np.uint8)
        rgb[::3] = 90
        e = m.predict(rgb)
        print(json.dumps([peak(), e.density.shape]))''')
    assert used[0] <= 400 and used[1] == [750, 1000]

@linux
@pytest.mark.slow
def test_shipped_big_picture_from_a_file(tmp_path):
    Image.fromarray(picture(6000, 8000)).save(tmp_path/'big.jpg')
    try: model_path('counting')
    except ModelError as e: pytest.skip(str(e))
    used = fresh(f'''
        import json
        from crowd_density.inference import load, predict_files
        line, = predict_files(load('counting'), [{str(tmp_path/'big.jpg')!r}])
        print(json.dumps([peak(), line['error']]))''')
    assert used[1] is None and used[0] <= 600

@linux
def test_shipped_counting_starts_cold(tmp_path):
    try: model_path('counting')
    except ModelError as e: pytest.skip(str(e))
    Image.fromarray(picture(768, 1024)).save(tmp_path/'one.jpg')
    code = f'''
        import json, time
        t = time.process_time()
        from crowd_density.inference import load, predict_files
        line, = predict_files(load('counting', threads=1), [{str(tmp_path/'one.jpg')!r}])
        print(json.dumps([time.process_time() - t, peak(), line]))'''
    seconds, mb, line = fresh(code)
    assert line['error'] is None and line['low'] <= line['count'] <= line['high']
    assert mb <= 400 and seconds <= 4 # CPU seconds, of a machine that may be busy; 2 on a quiet one
