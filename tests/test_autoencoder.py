"Room 03: the report's autoencoder"
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from crowd_density import autoencoder as A
from crowd_density.data import DataError, Item, open_data
from crowd_density.preprocessing import HEAT, prepare, read_pairs
from crowd_density.segmentation import load_weights
from crowd_density.synthetic import write_dataset

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    d = tmp_path_factory.mktemp('scenes')
    write_dataset(d, 14, seed=1, size_hw=(96, 128))
    return open_data(d)

def test_parameters_and_layers():
    m = A.ConvAutoencoder()
    assert sum(p.numel() for p in m.parameters() if p.requires_grad) == 346_241
    assert len(m.encoder) == len(m.decoder) == 12
    assert not any(isinstance(o, torch.nn.BatchNorm2d) for o in m.modules())

@pytest.mark.parametrize('size', [(8, 8), (64, 104), (256, 256)])
def test_shape_is_kept_and_heat_not_negative(size):
    y = A.ConvAutoencoder().eval()(torch.randn(2, 3, *size))
    assert y.shape == (2, 1, *size) and y.min() >= 0

@pytest.mark.parametrize('size', [(60, 64), (64, 63)])
def test_other_sides_are_refused(size):
    with pytest.raises(ValueError, match='divisible by 8'): A.ConvAutoencoder()(torch.randn(1, 3, *size))

def test_targets_sum_to_people(scenes):
    ds = A.HeatSquares(scenes, 64, train=False)
    for o, (x, y) in zip(scenes, ds): assert float(y.sum())/HEAT == pytest.approx(o.count(), rel=1e-3, abs=1e-3)
    moved = A.HeatSquares(scenes, 64, seed=1, least=1)
    assert sorted(float(y.sum()) for _, y in moved) == pytest.approx(sorted(float(y.sum()) for _, y in ds), rel=1e-5)

@given(st.integers(0, 10_000), st.integers(0, 63), st.integers(0, 63))
@settings(max_examples=30, deadline=None)
def test_enlarging_keeps_the_heat_of_what_stays(seed, y, x):
    heat, rgb = np.zeros((64, 64), np.float32), np.zeros((64, 64, 3), np.uint8)
    heat[max(y-2, 0):y+3, max(x-2, 0):x+3], rgb[y, x] = 1, 255
    whole = np.ones((64, 64), np.float32)
    seen = A.enlarged(rgb, heat, np.random.default_rng(seed))[1]
    part = A.enlarged(rgb, whole, np.random.default_rng(seed))[1]
    assert seen.shape == part.shape == (64, 64) and .6**2 - .03 < part.mean() <= 1
    assert seen.sum() <= heat.sum()*1.25

def test_examples_repeat(scenes):
    a, b = A.HeatSquares(scenes, 32, seed=2), A.HeatSquares(scenes, 32, seed=2)
    list(a)
    a.epoch = b.epoch = 3
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1]))
    b.epoch = 4
    assert not torch.equal(a[1][0], b[1][0])

def test_killed_and_resumed_equals_undisturbed(scenes, tmp_path):
    class Killed(Exception): pass
    def cut(epochs, what):
        for e in epochs:
            if e == 2: raise Killed
            yield e
    kw = dict(epochs=4, size=32, bs=4)
    whole = A.train_autoencoder(scenes, tmp_path/'a', **kw)
    with pytest.raises(Killed): A.train_autoencoder(scenes, tmp_path/'b', progress=cut, **kw)
    again = A.train_autoencoder(scenes, tmp_path/'b', resume=True, **kw)
    a, b = [load_weights(tmp_path/k/'model.safetensors')[0] for k in 'ab']
    for k in a: assert torch.allclose(a[k], b[k], rtol=1e-2, atol=1e-3), k
    assert whole['best_epoch'] == again['best_epoch'] and whole['task'] == 'autoencoder'
    assert whole['figures']['tune']['zero']['mspe'] == 1 and {'model', 'mean'} < whole['figures']['tune'].keys()
    assert 'ShanghaiTech' not in whole['data']
    assert {'model.safetensors', 'model.onnx', 'history.csv', 'checkpoint.pth', 'curves.png'} <= {p.name for p in (tmp_path/'a').iterdir()}

def test_onnx_equals_torch(scenes, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    A.train_autoencoder(scenes, tmp_path, epochs=1, size=32, bs=4)
    m = A.ConvAutoencoder().eval()
    load_weights(tmp_path/'model.safetensors', m)
    x = torch.randn(1, 3, 48, 64)
    got = ort.InferenceSession(tmp_path/'model.onnx', providers=['CPUExecutionProvider']).run(None, {'image': x.numpy()})[0]
    with torch.no_grad(): np.testing.assert_allclose(got, m(x).numpy(), rtol=1e-3, atol=1e-6)

def test_a_prepared_folder_is_data_too(scenes, tmp_path):
    prepare(scenes, tmp_path/'p', size=32)
    pairs = read_pairs(tmp_path/'p')
    train, tune = A.split_pairs(pairs)
    assert train and tune and not {p.file for p in train} & {p.file for p in tune} and not A.from_shanghai(pairs)
    card = A.train_autoencoder(tmp_path/'p', tmp_path/'r', epochs=1, size=32, bs=4)
    assert card['n_train'] == len(train)
    with pytest.raises(DataError, match='heatmap of 64'): A.HeatSquares(train, 64)

def test_scores_beside_zero_and_mean(scenes):
    ds = A.HeatSquares(scenes, 32, train=False)
    mean = np.mean([y[0].numpy() for _, y in ds], axis=0)
    got = A.heat_scores(A.ConvAutoencoder(), ds, mean)
    truth = np.stack([y[0].numpy() for _, y in ds]).astype(np.float64)
    assert got['zero']['mspe'] == 1 and got['zero']['mae'] == pytest.approx(truth.mean())
    assert got['mean']['mspe'] == pytest.approx(((truth - mean)**2).sum()/(truth**2).sum(), rel=1e-5)

def test_unreadable_data_is_refused(tmp_path):
    (tmp_path/'a.jpg').write_text('no picture')
    (tmp_path/'a.csv').write_text('x,y\n1,1\n')
    with pytest.raises(DataError): A.HeatSquares([Item(tmp_path/'a.jpg', tmp_path/'a.csv')], 32)
