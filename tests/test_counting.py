"Room 05: the counting model, its loss, its crops and runs that survive"
import json, math, signal, subprocess, sys

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from crowd_density.counting import (Atlas, BlockLoss, CountingModel, CropLoader, RECIPES, add_scenes, cut, cut_outs, density_of,
    fine_tune, fit_gain, fit_phase, flat_cos, mixed, n_parameters, negative_binomial, targets, train_counting)
from crowd_density.data import DataError, open_data
from crowd_density.segmentation import load_weights
from crowd_density.synthetic import scene, write_dataset

TINY = {**RECIPES['trial'], 'size': 64, 'bs': 4, 'made': (2, 4)}

@pytest.fixture(scope='module')
def atlas():
    a = Atlas()
    for i in range(3):
        s = scene(i, (256, 320))
        a.add(s.rgb, s.points_xy, 'A', f'scene {i}')
    return add_scenes(a, 2, 4, size_hw=(128, 160))

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('data')
    write_dataset(out, 16, 0, size_hw=(128, 160))
    return out

@pytest.fixture(scope='module')
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')
    return out, train_counting(folder, out, {**TINY, 'judged': 1, 'final': 1})

def test_size_of_the_model():
    m = CountingModel(pretrained=False)
    assert n_parameters(m) - n_parameters(m.encoder) <= 4_000_000
    assert n_parameters(m) < 5_000_000

@pytest.mark.parametrize('size', [(32, 32), (64, 96), (320, 32)])
def test_shape_and_sign(size):
    y = CountingModel(pretrained=False).eval()(torch.randn(1, 3, *size))
    assert y.shape == (1, 1, size[0]//8, size[1]//8) and (y >= 0).all()

@pytest.mark.parametrize('hw', [(33, 47), (127, 128), (32, 200)])
def test_any_picture_size(hw):
    d = density_of(CountingModel(pretrained=False).eval(), np.zeros((*hw, 3), np.uint8))
    assert d.shape == (-(-hw[0]//8), -(-hw[1]//8))

def test_frozen_layers_stay():
    m = CountingModel(pretrained=False).freeze_to(4).train()
    assert not any(p.requires_grad for p in m.encoder[:4].parameters())
    assert not any(o.training for layer in m.encoder[:4] for o in layer.modules()) and m.encoder[5].training

@given(st.floats(.01, 50), st.integers(0, 40), st.floats(.001, 1))
def test_likelihood_is_smallest_at_the_truth(p, t, alpha):
    p, t = torch.tensor(p, dtype=torch.float64), torch.tensor(float(t), dtype=torch.float64)
    assert negative_binomial(p, t, alpha) >= -1e-6
    assert abs(negative_binomial(t.clamp_min(1e-6), t, alpha)) < 1e-4

@pytest.mark.parametrize('alpha', [0, .05, .5])
def test_likelihood_against_scipy(alpha):
    from scipy.stats import nbinom, poisson
    t, p = np.array([0, 1, 7, 30]), np.array([.5, 2., 5., 33.])
    if alpha: ll = lambda m: nbinom.logpmf(t, 1/alpha, 1/(1 + alpha*m))
    else: ll = lambda m: poisson.logpmf(t, m)
    expected = ll(np.maximum(t, 1e-9)) - ll(p)
    found = negative_binomial(torch.tensor(p), torch.tensor(t, dtype=torch.float64), alpha).numpy()
    assert np.allclose(found, expected, atol=1e-5)

def test_block_loss_against_loops():
    g = torch.Generator().manual_seed(0)
    p, t = torch.rand(2, 1, 8, 8, generator=g), torch.randint(0, 3, (2, 1, 8, 8), generator=g).float()
    total = 0.
    for n in range(2):
        for k in (1, 2, 4, 8):
            for i in range(0, 8, k):
                a, b = p[n, 0, i:i + k], t[n, 0, i:i + k]
                for j in range(0, 8, k): total += negative_binomial(a[:, j:j + k].sum(), b[:, j:j + k].sum(), .05)
        total += negative_binomial(p[n].sum(), t[n].sum(), .05)
    assert math.isclose(BlockLoss(.05)(p, t), total/2*.02, rel_tol=1e-4)

@settings(max_examples=30, deadline=None)
@given(st.integers(40, 90), st.integers(40, 90), st.floats(.3, 3), st.floats(0, 1), st.floats(0, 1), st.integers(0, 999))
def test_a_crop_keeps_the_heads_it_covers(h, w, scale, y, x, seed):
    rng = np.random.default_rng(seed)
    points = (rng.random((30, 2))*[w, h]).astype(np.float32)
    crop, p = cut(torch.zeros(3, h, w, dtype=torch.uint8), points, 64, scale, (y, x))
    assert crop.shape == (3, 64, 64) and len(p) <= 30 and ((p >= 0) & (p < 64)).all()
    if scale <= 64/max(h, w) and h == w: assert len(p) == 30
    assert targets([p], 64).sum() == len(p)

def test_nobody_under_a_cut_out():
    x, p = torch.ones(8, 3, 64, 64), [np.argwhere(np.ones((64, 64)))[:, ::-1].astype(np.float32)]*8
    out, kept = cut_outs(x, p, np.random.default_rng(1), share=1.)
    for o, k in zip(out, kept): assert len(k) == (o[0] == 1).sum()

def test_batches_are_seeded_and_cover_the_real_pictures(atlas):
    a = CropLoader(atlas, bs=4, size=64)
    one, two = list(a), list(a)
    assert all(torch.equal(i[0], j[0]) and torch.equal(i[1], j[1]) for i, j in zip(one, two))
    a.epoch = 1
    assert not torch.equal(next(iter(a))[0], one[0][0])
    order = a.order(np.random.default_rng(0))
    assert {0, 1, 2} <= set(order.tolist()) and len(order) % 4 == 0

def test_schedule():
    f = flat_cos((1., 2.)).scheds['lr']
    assert f(.5) == [1., 2.] and f(.74) == [1., 2.] and f(0)[0] < .1 and f(.9999)[1] < 1e-3

def test_gain_takes_out_the_bias():
    rows = [('', 'A', 100, 90.), ('', 'A', 200, 180.), ('', 'B', 10, 9.), ('', 'B', 20, 18.)]
    assert math.isclose(fit_gain(rows), 1/.9, abs_tol=2e-3)

@given(st.floats(0, 1))
@settings(deadline=None, max_examples=10)
def test_mixture_lies_between(share):
    m = mixed({'w': torch.zeros(3)}, {'w': torch.ones(3)}, share)
    assert torch.allclose(m['w'], torch.full((3,), share))

def test_files_of_a_run(trained):
    out, card = trained
    assert {'model.safetensors', 'model.onnx', 'run.json', 'judged', 'final'} <= {p.name for p in out.iterdir()}
    assert card['task'] == 'counting' and {'tune', 'valid'} <= card['figures'].keys()
    assert 'constant_mae' in card['figures']['valid']['A']

def test_onnx_says_what_torch_says(trained):
    import onnxruntime as ort
    out, card = trained
    m = CountingModel(pretrained=False)
    load_weights(out/'model.safetensors', m)
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad(): ours = m.eval()(x).numpy()
    theirs = ort.InferenceSession(out/'model.onnx', providers=['CPUExecutionProvider']).run(None, {'image': x.numpy()})[0]
    assert theirs.shape == ours.shape and abs(theirs - ours).max() <= 1e-3*ours.max()

KILLED = '''
import sys, torch
torch.set_num_threads(1)
from crowd_density import counting as c
from crowd_density.counting import *
from crowd_density.synthetic import scene
c.Checkpoint.__init__.__defaults__ = (0,)
a = Atlas()
for i in range(3):
    s = scene(i, (256, 320))
    a.add(s.rgb, s.points_xy, 'A', f'scene {i}')
add_scenes(a, 2, 4, size_hw=(128, 160))
c.fit_phase(sys.argv[1], a, a, 4, {**RECIPES['trial'], 'size': 64, 'bs': 4}, report=lambda r: print(r['epoch'], flush=True))
'''

@pytest.fixture
def one_thread():
    "Sums in one order: two threads round otherwise than one"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def test_sigkill_and_resume_give_the_same_weights(atlas, tmp_path, one_thread):
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', KILLED, str(tmp_path/'a')], stdout=subprocess.PIPE, text=True)
    while p.stdout.readline().strip() != '2': assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert (tmp_path/'a'/'checkpoint.pth').exists()
    resumed, whole = fit_phase(tmp_path/'a', atlas, atlas, 4, TINY, resume=True), fit_phase(tmp_path/'b', atlas, atlas, 4, TINY)
    for a, b in zip(resumed.state_dict().values(), whole.state_dict().values()):
        if a.is_floating_point(): assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)

def test_a_run_is_resumed_with_its_own_recipe_only(folder, tmp_path):
    (tmp_path/'run.json').write_text(json.dumps(dict(name='own', recipe={**TINY, 'size': 96}, seed=0)))
    with pytest.raises(DataError, match='run.json'): train_counting(folder, tmp_path, TINY, resume=True)
    with pytest.raises(ValueError, match='expected one of'): train_counting(folder, tmp_path, 'unheard of')

def test_fine_tuning_keeps_what_is_better(trained, folder, tmp_path):
    out, _ = trained
    card = fine_tune(out/'model.safetensors', open_data(folder), tmp_path, epochs=1, made=(2, 4))
    f = card['figures']
    assert f['share'] in (0, .25, .5, .75, 1) and f['before']['A']['n'] == f['after']['A']['n']
    assert (tmp_path/'model.onnx').exists()

def test_the_shipped_splits_are_used(real_data):
    from crowd_density.data import split_of
    data = open_data(real_data)
    n = [len(split_of(data, s)) for s in ('train', 'tune', 'valid')]
    assert sum(n) == 700 and 400 <= n[0] <= 480
