"Density maps, masks, grids and prepared data sets: the laws, the slow oracles, and runs that go wrong"
import csv, errno, json, os, subprocess, sys, time
from pathlib import Path

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.ndimage import gaussian_filter

from crowd_density import preprocessing as pp
from crowd_density.data import CrowdData, DataError, Item, inside

ROOT = Path(__file__).parents[1]
sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))

@st.composite
def crowds(draw, most=40, size=sizes):
    "Points in and around a frame, some of them exactly on its border, and the frame"
    h, w = draw(size)
    edge = lambda n: st.sampled_from([0., n - 1., float(np.nextafter(np.float32(n), np.float32(0))), float(n)])
    one = st.tuples(*(st.one_of(st.floats(-5, n + 5, width=32), edge(n)) for n in (w, h)))
    return np.array(draw(st.lists(one, max_size=most)), np.float32).reshape(-1, 2), (h, w)

def per_head_loop(points_xy, size_hw, sigma=4):
    "The usual way: one full-picture Gaussian filter for each head"
    d = np.zeros(size_hw, np.float32)
    for x, y in inside(points_xy, size_hw):
        one = np.zeros(size_hw, np.float32)
        one[int(y), int(x)] = 1
        d += gaussian_filter(one, sigma, mode='reflect', truncate=4)
    return d

# ---- density

@settings(deadline=None, max_examples=60)
@given(crowds(), st.sampled_from([1, 2, 4, 15]))
def test_nobody_is_lost(crowd, sigma):
    points, size_hw = crowd
    d, n = pp.density(points, size_hw, sigma), len(inside(points, size_hw))
    assert d.shape == size_hw and d.dtype == np.float32 and d.min() >= 0
    assert abs(d.sum(dtype=float) - n) <= 1e-4*n

@settings(deadline=None, max_examples=25)
@given(crowds(12), st.sampled_from([1, 4, 7]))
def test_density_equals_the_loop(crowd, sigma):
    np.testing.assert_allclose(pp.density(*crowd, sigma), per_head_loop(*crowd, sigma), atol=2e-6)

@pytest.mark.parametrize('xy', [(0, 0), (99.99, 0), (0, 79.99), (99.99, 79.99), (50, 0), (99, 40)])
def test_border_and_corners(xy):
    assert pp.density([xy], (80, 100)).sum() == pytest.approx(1, rel=1e-4)
    assert pp.mask([xy], (80, 100))[int(xy[1]), int(xy[0])]

@pytest.mark.parametrize('points', [[], np.zeros((0, 2)), [[200, 5]], [[-1, 5], [5, -.5]]])
def test_nobody(points):
    assert pp.density(points, (40, 50)).sum() == 0
    assert not pp.mask(points, (40, 50)).any()
    assert pp.adaptive_density(points, (40, 50)).shape == (40, 50)
    assert pp.heatmap(points, (40, 50), 32).sum() == 0

def test_flips_commute():
    p = np.random.default_rng(0).integers(0, [61, 47], (30, 2)).astype(np.float32)
    d = pp.density(p, (47, 61))
    np.testing.assert_allclose(pp.density([60, 0] + p*[-1, 1], (47, 61)), d[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(pp.density([0, 46] + p*[1, -1], (47, 61)), d[::-1], atol=1e-6)

@pytest.mark.parametrize('sigma', [0, -1, np.nan, np.inf])
def test_sigma_is_checked(sigma):
    with pytest.raises(ValueError, match='sigma'): pp.density([[1, 1]], (9, 9), sigma)

def test_many_heads_keep_their_number():
    p = np.random.default_rng(1).uniform(0, [1024, 768], (20_000, 2))
    assert pp.density(p, (768, 1024)).sum(dtype=float) == pytest.approx(20_000, rel=1e-5)

# ---- adaptive

@settings(deadline=None, max_examples=40)
@given(crowds(25))
def test_adaptive_keeps_the_number(crowd):
    points, size_hw = crowd
    n = len(inside(points, size_hw))
    assert pp.adaptive_density(points, size_hw).sum(dtype=float) == pytest.approx(n, rel=1e-4, abs=1e-6)

def test_adaptive_equals_a_loop():
    rng, hw = np.random.default_rng(2), (90, 120)
    p = rng.uniform([20, 20], [100, 70], (15, 2))
    slow = np.zeros(hw)
    for i, (x, y) in enumerate(p):
        near = np.sort(np.hypot(*(p - p[i]).T))[1:4].mean()
        slow += per_head_loop([(x, y)], hw, max(.3*near, 1)).astype(float)
    np.testing.assert_allclose(pp.adaptive_density(p, hw), slow, atol=2e-4*slow.max())

def test_sigmas_of_coinciding_heads_stay_positive(): assert (pp.head_sigmas([[3, 3]]*5) == 1).all()

# ---- mask

def test_mask_by_its_definition():
    p = np.random.default_rng(3).uniform(0, 60, (9, 2))
    slow = per_head_loop(p, (60, 60))*2*np.pi*16
    for level in (.1, .5): assert (pp.mask(p, (60, 60), level=level) == (slow > level)).mean() > .999
    assert pp.mask(p, (60, 60), level=.5).sum() < pp.mask(p, (60, 60)).sum()

@given(st.integers(32, 150), st.integers(32, 150), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_three_looks_laws(h, w, seed):
    "Between 0 and 1, of the picture's size, mirrored with the picture, never below the mean of the first two looks; plain where all looks agree"
    rgb = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    def look(x): return x[..., 0]/np.float32(255)
    human = pp.three_looks(look, rgb)
    assert human.shape == (h, w) and human.dtype == np.float32 and 0 <= human.min() and human.max() <= 1
    assert (human >= (look(rgb) + look(rgb[:, ::-1])[:, ::-1])/2 - 1e-6).all()
    if w % 2 == 0: np.testing.assert_allclose(pp.three_looks(look, np.ascontiguousarray(rgb[:, ::-1])), human[:, ::-1], atol=.01)
    for p in (0, .5, 1): np.testing.assert_allclose(pp.three_looks(lambda x: np.full(x.shape[:2], p, np.float16), rgb), p, atol=1e-3)

@pytest.mark.parametrize('own,half,found', [(.1, .9, .9), (.3, .9, .3), (.1, .7, .1), (.9, .1, .9)])
def test_the_half_has_a_say_only_where_nobody_becomes_a_packed_crowd(own, half, found):
    looks = []
    def look(x):
        looks.append(x.shape[:2])
        return np.full(x.shape[:2], half if x.shape[0] < 200 else own)
    np.testing.assert_allclose(pp.three_looks(look, np.zeros((201, 300, 3), np.uint8)), found, atol=1e-6)
    assert looks == [(201, 300), (201, 300), (100, 150)]

def test_mask_reaches_as_far_as_stated():
    y, x = np.nonzero(pp.mask([[50, 50]], (101, 101)))
    assert np.hypot(y - 50, x - 50).max() == pytest.approx(8.6, abs=.15)

# ---- count_grid

@settings(deadline=None, max_examples=60)
@given(crowds(), st.integers(1, 33))
def test_count_grid_equals_a_loop(crowd, stride):
    points, (h, w) = crowd
    slow = np.zeros((-(-h//stride), -(-w//stride)), np.float32)
    for x, y in points:
        if 0 <= x < w and 0 <= y < h: slow[int(y)//stride, int(x)//stride] += 1
    np.testing.assert_array_equal(pp.count_grid(points, (h, w), stride), slow)

@pytest.mark.parametrize('stride', [0, -8, 2.5])
def test_stride_is_checked(stride):
    with pytest.raises(ValueError, match='stride'): pp.count_grid([[1, 1]], (9, 9), stride)

# ---- resizing

def slow_resize(d, size_hw):
    "Each old cell shared among the new ones, cell by cell"
    (h, w), (H, W) = d.shape, size_hw
    out = np.zeros(size_hw)
    part = lambda i, n, I, N: max(0, min((i + 1)/n, (I + 1)/N) - max(i/n, I/N))*n
    for i in range(h):
        for I in range(H):
            a = part(i, h, I, H)
            if a > 0:
                for j in range(w):
                    for J in range(W): out[I, J] += d[i, j]*a*part(j, w, J, W)
    return out

@settings(deadline=None, max_examples=60)
@given(arrays(np.float32, sizes, elements=st.floats(0, 100, width=32)), sizes)
def test_resize_keeps_the_sum(d, size_hw):
    r = pp.resize_density(d, size_hw)
    assert r.shape == size_hw and r.dtype == np.float32 and r.min() >= 0
    assert r.sum(dtype=float) == pytest.approx(d.sum(dtype=float), rel=1e-5, abs=1e-6)

ODD = [((7, 9), (3, 4)), ((5, 4), (11, 13)), ((6, 6), (3, 9)), ((1, 8), (4, 1)), ((8, 8), (8, 8))]

@pytest.mark.parametrize('old,new', ODD)
def test_resize_equals_a_loop(old, new):
    d = np.random.default_rng(4).random(old).astype(np.float32)
    np.testing.assert_allclose(pp.resize_density(d, new), slow_resize(d, new), rtol=1e-5)

def test_wide_maps_are_done_in_pieces():
    d = np.random.default_rng(5).random((9, 1500)).astype(np.float32)
    np.testing.assert_allclose(pp.resize_density(d, (3, 300)), d.reshape(3, 3, 300, 5).sum((1, 3)), rtol=1e-5)

@settings(deadline=None, max_examples=30)
@given(crowds(size=st.tuples(st.integers(32, 90), st.integers(32, 90))), st.integers(8, 64))
def test_heatmap_counts(crowd, size):
    points, size_hw = crowd
    n, hot = len(inside(points, size_hw)), pp.heatmap(points, size_hw, size)
    assert hot.shape == (size, size) and hot.sum(dtype=float)/pp.HEAT == pytest.approx(n, rel=1e-4, abs=1e-6)

# ---- prepare

def write_photos(folder, n=6, seed=0, hw=(96, 128), **kw):
    "`n` pictures with a CSV of points, as `CrowdData`"
    rng, items = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/'points.csv', 'w', encoding='utf-8') as f:
        f.write('file,x,y\n')
        for i in range(n):
            name = f'bild ä {i}.png' if i == 1 else f'IMG_{i}.jpg'
            Image.fromarray(rng.integers(0, 255, (*hw, 3), np.uint8)).save(folder/name)
            if i == 2: f.write(f'{name},,\n') # nobody
            else: f.writelines(f'{name},{x:.3f},{y:.3f}\n' for x, y in rng.uniform(0, [hw[1], hw[0]], (5*i + 1, 2)))
            items.append(Item(folder/name, folder/'points.csv', number=i, **kw))
    return CrowdData(items, folder)

def files(out): return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob('*')) if p.is_file()}

@pytest.fixture
def photos(tmp_path): return write_photos(tmp_path/'photos')

def test_prepare_writes_what_it_says(photos, tmp_path):
    out, seen = tmp_path/'out', []
    def progress(jobs, text):
        seen.append((len(jobs), text))
        return jobs

    assert pp.prepare(photos, out, size=64, progress=progress) == []
    assert seen == [(6, 'prepare')]
    pairs = pp.read_pairs(out)
    assert [p.file for p in pairs] == ['IMG_0.png', 'bild ä 1.png', 'IMG_2.png', 'IMG_3.png', 'IMG_4.png', 'IMG_5.png']
    assert [p.source for p in pairs] == [o.name for o in photos] and not (out/'.writing').exists()
    for pair, item in zip(pairs, photos):
        with Image.open(pair.image) as im: assert im.size == (64, 64) and im.mode == 'RGB'
        with Image.open(pair.heatmap) as im: assert im.size == (64, 64) and im.mode.startswith('I;16')
        with Image.open(pair.mask) as im: assert set(np.unique(np.asarray(im))) <= {0, 255}
        hot, n = pp.get_heatmap(pair.image), item.count()
        assert pair.heads == n and (pair.height, pair.width) == (96, 128)
        assert hot.sum(dtype=float)/pp.HEAT == pytest.approx(n, rel=.005)
        np.testing.assert_allclose(hot, pp.heatmap(item.points(), (96, 128), 64), atol=1e-4*max(hot.max(), 1))
        with Image.open(pair.heatmap) as im: steps = np.asarray(im).sum(dtype=float)
        assert steps*pair.scale/pp.HEAT == pytest.approx(n, rel=.005)         # from the table alone
        assert pp.get_mask(pair).mean() == pytest.approx(pair.share, abs=.02)

def test_rows_are_text_that_others_can_read(photos, tmp_path):
    pp.prepare(photos, tmp_path/'out', size=32)
    with open(tmp_path/'out/pairs.csv', encoding='utf-8', newline='') as f: rows = list(csv.DictReader(f))
    assert [r['file'] for r in rows][:2] == ['IMG_0.png', 'bild ä 1.png'] and float(rows[0]['scale']) > 0
    assert str(tmp_path) not in (tmp_path/'out/pairs.csv').read_text('utf-8')

def test_same_bytes_again_and_with_any_number_of_workers(photos, tmp_path):
    for i, workers in enumerate((1, 4)): pp.prepare(photos, tmp_path/f'out{i}', size=32, workers=workers)
    first = files(tmp_path/'out0')
    assert files(tmp_path/'out1') == first
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path/'out0').rglob('IMG*.png')}
    pp.prepare(photos, tmp_path/'out0', size=32)
    assert files(tmp_path/'out0') == first and stamps == {p: p.stat().st_mtime_ns for p in stamps}

def test_what_changed_is_made_again(photos, tmp_path):
    out = tmp_path/'out'
    pp.prepare(photos, out, size=32)
    (out/'mask/IMG_3.png').unlink()
    lines = (photos.root/'points.csv').read_text('utf-8').splitlines()
    lines = [l for l in lines if 'IMG_4' not in l] + ['IMG_4.jpg,,']
    (photos.root/'points.csv').write_text('\n'.join(lines), 'utf-8')
    pp.prepare(photos, out, size=32)
    pp.prepare(photos, tmp_path/'fresh', size=32)
    assert files(out) == files(tmp_path/'fresh') and pp.read_pairs(out)[4].heads == 0

def test_one_bad_item_never_stops_the_run(photos, tmp_path):
    (photos[0].image).write_bytes(photos[0].image.read_bytes()[:2000])
    (photos[3].image).write_bytes(b'')
    (photos[4].image).write_text('not a picture')
    Image.new('RGB', (31, 40)).save(photos[5].image)
    missing, bare = Item(photos.root/'missing.jpg', photos.root/'points.csv'), Item(photos.root/'x.png')
    failures = pp.prepare(CrowdData([*photos, missing, bare], photos.root), tmp_path/'out', size=32)
    names = [f'IMG_{i}.jpg' for i in (0, 3, 4, 5)]
    assert [Path(o.file).name for o in failures] == [*names, 'missing.jpg', 'x.png']
    assert all('expected' in o.reason and 'found' in o.reason for o in failures)
    assert [p.file for p in pp.read_pairs(tmp_path/'out')] == ['bild ä 1.png', 'IMG_2.png']

def test_halves_of_one_name_and_two_pictures_of_one_name(tmp_path):
    a, b = (write_photos(tmp_path/p, 3, seed=i, part=p, split='train') for i, p in enumerate('AB'))
    assert pp.prepare(CrowdData([*a, *b], tmp_path), tmp_path/'out', size=32) == []
    pairs = pp.read_pairs(tmp_path/'out')
    assert [p.file for p in pairs[::3]] == ['A_train/IMG_0.png', 'B_train/IMG_0.png']
    assert pairs[3].source == 'B/IMG_0.jpg'
    assert pp.get_heatmap(pairs[3].image).sum()/pp.HEAT == pytest.approx(1, rel=.005)
    Image.new('RGB', (64, 64)).save(tmp_path/'A/img_0.bmp')
    double = CrowdData([*a, Item(tmp_path/'A/img_0.bmp', a[0].annotation, part='A', split='train')], tmp_path/'A')
    failures = pp.prepare(double, tmp_path/'out2', size=32)
    assert [Path(o.file).name for o in failures] == ['IMG_0.jpg', 'img_0.bmp']
    assert 'one picture of this name' in failures[0].reason
    assert len(pp.read_pairs(tmp_path/'out2')) == 2

KILLED = '''
import sys, json
from pathlib import Path
from crowd_density.data import CrowdData, Item
from crowd_density.preprocessing import prepare
folder, out = map(Path, sys.argv[1:3])
names = json.loads((folder/'names.json').read_text('utf-8'))
print('ready', flush=True)
prepare(CrowdData([Item(folder/n, folder/'points.csv') for n in names], folder), out, size=64)
'''

def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    photos, out = write_photos(tmp_path/'photos', 40, hw=(240, 320)), tmp_path/'out'
    (photos.root/'names.json').write_text(json.dumps([o.name for o in photos]), 'utf-8')
    pp.prepare(CrowdData([Item(o.image, o.annotation) for o in photos], photos.root), tmp_path/'whole', size=64)
    cut = 0
    for wait in (0, .03, .1, .2):
        with subprocess.Popen([sys.executable, '-c', KILLED, photos.root, out], stdout=subprocess.PIPE, cwd=ROOT) as p:
            p.stdout.readline()
            time.sleep(wait)
            p.kill()
        cut += not (out/'pairs.csv').exists()
    assert cut, 'no run was cut short: the test proves nothing'
    pp.prepare(CrowdData([Item(o.image, o.annotation) for o in photos], photos.root), out, size=64)
    assert files(out) == files(tmp_path/'whole')

def test_full_disk_is_said_and_loses_nothing(photos, tmp_path, monkeypatch):
    out, write, n = tmp_path/'out', Path.write_bytes, []
    pp.prepare(photos[:2], out, size=32)
    before = files(out)
    def full(self, data):
        if '.writing' in self.parts:
            n.append(1)
            if len(n) > 5:
                write(self, data[:10])
                raise OSError(errno.ENOSPC, 'No space left on device')
        return write(self, data)
    with monkeypatch.context() as m:
        m.setattr(Path, 'write_bytes', full)
        with pytest.raises(pp.OutputError, match='No space left on device'): pp.prepare(photos, out, size=32)
    assert before.items() <= files(out).items()
    pp.prepare(photos, out, size=32)
    pp.prepare(photos, tmp_path/'fresh', size=32)
    assert files(out) == files(tmp_path/'fresh')

def test_unwritable_output(photos, tmp_path):
    (tmp_path/'file').write_text('mine')
    for out in (tmp_path/'file', tmp_path/'file/below'):
        with pytest.raises(pp.OutputError, match='expected a folder|expected an empty folder'): pp.prepare(photos, out)
    assert (tmp_path/'file').read_text() == 'mine'
    if os.geteuid() == 0: pytest.skip('root may write anywhere: no folder without permission to test')
    (tmp_path/'locked').mkdir(mode=0o500)
    with pytest.raises(pp.OutputError, match='Permission'): pp.prepare(photos, tmp_path/'locked/out')

def test_nothing_of_others_is_touched(photos, tmp_path):
    for out in (photos.root, photos.root.parent):
        with pytest.raises(pp.OutputError, match='without the data'): pp.prepare(photos, out)
    other = tmp_path/'other'
    (other/'images').mkdir(parents=True)
    (other/'images/IMG_0.png').write_text('mine')
    with pytest.raises(pp.OutputError, match='made by prepare'): pp.prepare(photos, other)
    pp.prepare(photos, tmp_path/'out', size=32)
    before = files(tmp_path/'out')
    for kw in (dict(size=64), dict(size=32, sigma=8)):
        with pytest.raises(pp.OutputError, match='sigma'): pp.prepare(photos, tmp_path/'out', **kw)
    assert files(tmp_path/'out') == before and (other/'images/IMG_0.png').read_text() == 'mine'

@pytest.mark.parametrize('kw', [dict(size=4), dict(size=33.5), dict(sigma=0)])
def test_arguments_are_checked_before_anything_is_written(photos, tmp_path, kw):
    with pytest.raises(ValueError): pp.prepare(photos, tmp_path/'out', **kw)
    assert not (tmp_path/'out').exists()

def test_kinds_of_pictures(tmp_path):
    "Greys of 16 bits, CMYK, palettes, alpha and a rotation note are read as stored"
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8))
    exif = rgb.getexif()
    exif[274] = 6
    (tmp_path/'k').mkdir()
    Image.fromarray(rng.integers(0, 65535, (60, 80)).astype(np.uint16)).save(tmp_path/'k/deep.png')
    rgb.save(tmp_path/'k/turned.jpg', exif=exif)
    kinds = dict(CMYK='cmyk.jpg', P='palette.png', RGBA='alpha.png', L='grey.jpg')
    for mode, name in kinds.items(): rgb.convert(mode).save(tmp_path/'k'/name)
    names = sorted(p.name for p in (tmp_path/'k').iterdir())
    (tmp_path/'k/p.csv').write_text('file,x,y\n' + ''.join(f'{n},79,10\n' for n in names))
    data = CrowdData([Item(tmp_path/'k'/n, tmp_path/'k/p.csv') for n in names], tmp_path/'k')
    assert pp.prepare(data, tmp_path/'out', size=32) == []
    assert all((p.height, p.width, p.heads) == (60, 80, 1) for p in pp.read_pairs(tmp_path/'out'))

# ---- reading back

def test_reading_what_is_not_there(photos, tmp_path):
    with pytest.raises(DataError, match='pairs.csv'): pp.read_pairs(tmp_path)
    pp.prepare(photos, tmp_path/'out', size=32)
    image = tmp_path/'out/images/IMG_0.png'
    (tmp_path/'out/mask/IMG_0.png').write_bytes(b'')
    with pytest.raises(DataError, match='mask'): pp.get_mask(image)
    Image.new('I;16', (32, 32)).save(tmp_path/'out/heatmap/IMG_0.png')
    with pytest.raises(DataError, match='scale'): pp.get_heatmap(image)
    (tmp_path/'out/heatmap/IMG_0.png').unlink()
    with pytest.raises(DataError, match='heatmap'): pp.get_heatmap(image)
    (tmp_path/'out/pairs.csv').write_text('file,source\na,b\n')
    with pytest.raises(DataError, match='pairs.csv'): pp.read_pairs(tmp_path/'out')

# ---- the real data set

@pytest.mark.parametrize('part', ['A', 'B'])
def test_real_pictures(real_data, tmp_path, part):
    from crowd_density.data import open_data
    data = open_data(real_data/'shanghaitech').select(part)[:3]
    assert pp.prepare(data, tmp_path/'out') == []
    for pair, item in zip(pp.read_pairs(tmp_path/'out'), data):
        assert pair.heads == item.count() and pp.get_heatmap(pair).sum()/pp.HEAT == pytest.approx(pair.heads, rel=.005)
