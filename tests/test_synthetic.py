"Generated scenes and clips: the truth they come with is true, for any seed, size and time"
import csv, subprocess, sys, time, tomllib

import cv2, numpy as np, pytest
from hypothesis import example, given, settings, strategies as st
from scipy.io import loadmat

from crowd_density import synthetic
from crowd_density.data import open_data, read_points, read_rgb
from crowd_density.synthetic import (CAMERAS, EMPTY_KINDS, HEAD_M, View, alter, clip, empty_scene, scene, site_toml, truth_rows,
    write_clip, write_dataset)

few = settings(max_examples=12, deadline=None)
seeds, sides = st.integers(0, 2**40), st.integers(32, 190)

def well_formed(s, size_hw):
    "What every `Scene` promises"
    h, w = size_hw
    assert (s.rgb.shape, s.rgb.dtype, s.size_hw) == ((h, w, 3), np.uint8, (h, w))
    assert (s.lookalike_mask.shape, s.lookalike_mask.dtype) == ((h, w), bool)
    assert (s.points_xy.dtype, s.head_px.dtype) == (np.float32, np.float32)
    assert s.points_xy.shape == (len(s.head_px), 2) and np.isfinite(s.points_xy).all()
    assert ((s.points_xy >= 0) & (s.points_xy < (w, h))).all()

# scenes

@few
@given(seeds, sides, sides, st.sampled_from(CAMERAS), st.booleans())
def test_scene_of_any_size(seed, h, w, camera, dusk):
    s = scene(seed, (h, w), camera=camera, dusk=dusk)
    well_formed(s, (h, w))
    assert s.kind == camera and (s.head_px >= 4).all() and (s.head_px <= 64).all()
    x, y = np.round(s.points_xy).astype(int).T
    assert not s.lookalike_mask[y.clip(max=h-1), x.clip(max=w-1)].any()

@few
@given(seeds)
def test_same_seed_same_scene(seed):
    a, b, c = (scene(s, (96, 128)) for s in (seed, seed, seed+1))
    assert (a.rgb == b.rgb).all() and (a.points_xy == b.points_xy).all() and (a.lookalike_mask == b.lookalike_mask).all()
    assert (a.rgb != c.rgb).any()

def test_same_seed_same_scene_in_another_process():
    code = 'import hashlib; from crowd_density.synthetic import scene; s = scene(5, (96, 128)); print(hashlib.sha256(s.rgb.tobytes()+s.points_xy.tobytes()).hexdigest())'
    assert len({subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout for _ in range(2)}) == 1

@pytest.mark.parametrize('camera', CAMERAS)
@pytest.mark.parametrize('people', (0, 1, 30))
def test_as_many_people_as_asked(camera, people):
    for seed in range(3): assert len(scene(seed, (384, 512), people=people, camera=camera).points_xy) == people

@pytest.mark.parametrize('camera', CAMERAS)
def test_points_lie_on_drawn_heads(camera, monkeypatch):
    "Drawn with and without people, the picture differs at (nearly) every head, and nowhere far from a person"
    monkeypatch.setattr(synthetic, '_finish', lambda rng, rnd, rgb, dusk: rgb)
    full, bare = (scene(8, (384, 512), people=n, camera=camera, lookalikes=False, dusk=True) for n in (40, 0))
    change = np.abs(full.rgb.astype(int)-bare.rgb).max(2)
    x, y = np.floor(full.points_xy).astype(int).T
    assert (change[y, x] > 6).mean() > .94
    above = np.floor(y-1.6*full.head_px).astype(int)
    free = [not ((np.abs(x-a) < 6*p) & (np.abs(y-b) < 10*p))[np.arange(len(x)) != i].any() for i, (a, b, p) in enumerate(zip(x, y, full.head_px))]
    alone = np.array(free) & (above >= 0)
    assert (change[above[alone], x[alone]] <= 6).all(), 'nothing is drawn well above a lone head'

def test_heads_shrink_with_distance():
    s = scene(2, people=80, camera='street')
    rows = s.points_xy[:, 1]
    near, far = s.head_px[rows > np.quantile(rows, .75)], s.head_px[rows < np.quantile(rows, .25)]
    assert near.mean() > 2*far.mean()
    assert (np.diff(s.head_px) >= -1e-4).all(), 'farthest first'

def test_lookalikes_can_be_left_out():
    assert not scene(1, (384, 512), lookalikes=False).lookalike_mask.any()
    assert np.mean([scene(s, (384, 512), camera='square', people=20).lookalike_mask.any() for s in range(8)]) > .7

def test_dusk_is_darker():
    mean = lambda dusk: np.mean([scene(s, (192, 256), dusk=dusk).rgb.mean() for s in range(8)])
    assert mean(True) < .75*mean(False)

def test_scenes_differ():
    "Many seeds: by day and at dusk, in colour and grey, with few and many people, heads of 4 to 60 pixels"
    many = [scene(s, (192, 256)) for s in range(60)]
    assert {s.kind for s in many} == set(CAMERAS)
    assert any((s.rgb == s.rgb[..., :1]).all() for s in many) and np.ptp([s.rgb.mean() for s in many]) > 60
    assert np.ptp([len(s.points_xy) for s in many]) > 50

def test_usual_scene_is_fast():
    scene(0)
    start = time.process_time()
    for s in range(4): scene(s, camera='square', people=120)
    assert (time.process_time()-start)/4 < .6 # about .2 on a quiet core; others may share it

@pytest.mark.parametrize('bad', (dict(camera='fisheye'), dict(size_hw=(16, 100)), dict(size_hw=(100, 20000))))
def test_scene_refuses(bad):
    with pytest.raises(ValueError, match='expected .* found'): scene(0, **bad)

# pictures without people

@pytest.mark.parametrize('kind', EMPTY_KINDS)
def test_empty_scene(kind):
    for seed in range(3):
        for size in ((97, 150), (150, 64)):
            s = empty_scene(seed, size, kind)
            well_formed(s, size)
            assert s.kind == kind and not len(s.points_xy)
    assert (empty_scene(7, (64, 64), kind).rgb == empty_scene(7, (64, 64), kind).rgb).all()

@few
@given(seeds, sides, sides)
def test_empty_scene_of_any_size(seed, h, w): well_formed(empty_scene(seed, (h, w)), (h, w))

def test_empty_scene_by_name():
    assert empty_scene(0, kind='black').rgb.max() == 0 and empty_scene(0, kind='white').rgb.min() == 255
    assert np.ptp(empty_scene(0, kind='flat').rgb, axis=(0, 1)).max() == 0
    assert empty_scene(0, kind='lamps').lookalike_mask.any() and empty_scene(0, kind='cobbles').lookalike_mask.all()
    assert len({empty_scene(s, (32, 32)).kind for s in range(150)}) > len(EMPTY_KINDS)*.8
    with pytest.raises(ValueError, match='expected one of street'): empty_scene(0, kind='people')

# geometry

views = st.builds(View, st.floats(2, 30), st.floats(.02, 1.5), st.floats(100, 3000), st.just((480, 640)))

@settings(max_examples=200, deadline=None)
@given(views, st.floats(-20, 20), st.floats(.5, 100), st.floats(0, 1.9))
def test_view_there_and_back(view, x, y, z):
    place = np.array([x, y, z])
    if view.depth(place) < .3: return
    np.testing.assert_allclose(view.to_ground(view.to_px(place), z), [x, y], atol=1e-5*(1+y*y))
    ahead = place + (0, .5, 0)
    assert view.depth(ahead) > view.depth(place)
    assert np.isnan(view.to_ground([0, view.horizon-1])).all()

def test_view_is_a_homography():
    "Four points of the ground settle all others"
    view = View(6, .5, 700, (480, 640))
    m = np.float32([[-3, 6], [3, 6], [3, 14], [-3, 14]])
    h = cv2.getPerspectiveTransform(m, np.float32(view.to_px(np.column_stack([m, [0]*4]))))
    other = np.random.default_rng(0).uniform((-3, 6), (3, 14), (50, 2))
    np.testing.assert_allclose(cv2.perspectiveTransform(other[None], h.astype(float))[0], view.to_px(np.column_stack([other, np.zeros(50)])), atol=.01)

@few
@given(seeds, st.floats(.2, 1.))
def test_apart(seed, gap):
    "The fast grid against all pairs"
    p = np.random.default_rng(seed).uniform(0, 4, (80, 2))
    kept, slow = synthetic._apart(p, gap), []
    for i, a in enumerate(p):
        if all(np.hypot(*(a-p[j])) >= gap for j in slow): slow.append(i)
    assert kept == slow

@few
@given(seeds)
def test_within_is_pointPolygonTest(seed):
    rng = np.random.default_rng(seed)
    polygon = (np.array([[0, 0], [4, 0], [4, 3], [0, 3]]) + rng.uniform(-.5, .5, (4, 2)))
    p = rng.uniform(-1, 5, (100, 2))
    slow = [cv2.pointPolygonTest(polygon.astype(np.float32), (float(a), float(b)), True) for a, b in p]
    clear = np.abs(slow) > 1e-4
    assert (synthetic._within(polygon, p)[clear] == (np.array(slow) > 0)[clear]).all()
    np.testing.assert_allclose(synthetic._shoelace(polygon), cv2.contourArea(polygon.astype(np.float32)), rtol=1e-4)

# data sets

def test_dataset_is_read_back(tmp_path):
    out = write_dataset(tmp_path/'set', 8, seed=4, size_hw=(96, 128), test=.25, masks=True)
    data = open_data(out)
    assert out == tmp_path/'set' and len(data.select('A', 'train')) == 6 and len(data.select('A', 'test')) == 2 and not data.strays
    for n, item in enumerate([*data.select('A', 'train'), *data.select('A', 'test')]):
        s = scene(4_000_012+n, (96, 128))
        np.testing.assert_allclose(item.points(), s.points_xy, atol=1e-4)
        assert item.count() == len(s.points_xy) and np.abs(item.rgb().astype(int)-s.rgb).mean() < 12
        mask = read_rgb(item.image.parent.parent/'lookalikes'/f'{item.image.stem}.png')[..., 0]
        assert ((mask > 0) == s.lookalike_mask).all()

def test_mat_has_the_real_structure(tmp_path):
    synthetic._save_points(tmp_path/'GT_IMG_1.mat', [[0, 0], [3.5, 2]])
    info = loadmat(tmp_path/'GT_IMG_1.mat')['image_info']
    assert info.shape == (1, 1) and info.dtype == object and info[0, 0].shape == (1, 1) and info[0, 0].dtype.names == ('location', 'number')
    location, number = info[0, 0][0, 0]
    assert location.tolist() == [[1, 1], [4.5, 3]] and location.dtype == np.float64
    assert number.shape == (1, 1) and number[0, 0] == 2 and number.dtype == np.uint16
    assert read_points(tmp_path/'GT_IMG_1.mat').tolist() == [[0, 0], [3.5, 2]]

def test_dataset_without_people(tmp_path):
    data = open_data(write_dataset(tmp_path, 3, size_hw=(64, 64), empty=1., test=0))
    assert [o.count() for o in data] == [0, 0, 0] and data[0].points().shape == (0, 2)

def test_dataset_repeats(tmp_path):
    for d in 'ab': write_dataset(tmp_path/d, 3, seed=1, size_hw=(64, 96), part='B', progress=lambda o, text: list(o))
    a, b = (sorted(p for p in (tmp_path/d).rglob('*') if p.is_file()) for d in 'ab')
    assert len(a) == 6 and [p.relative_to(tmp_path/'a') for p in a] == [p.relative_to(tmp_path/'b') for p in b]
    for p, q in zip(a, b): assert p.suffix == '.mat' or p.read_bytes() == q.read_bytes()

# clips

@pytest.mark.parametrize('peak', (0, .5, 3, 8, 10))
@pytest.mark.parametrize('seconds', (5, 30, 120))
def test_density_is_people_over_area(seconds, peak):
    c = clip(seconds, peak, seed=int(peak))
    curve = np.array([c.density(t) for t in np.linspace(0, seconds, 41)])
    assert np.isclose(curve.max(), peak, atol=1.01/c.area_m2)
    assert curve[0] == 0 and (curve[31:] == 0).all()
    assert 20 <= c.area_m2 <= 60 and c.density(seconds/2) == c.people(seconds/2)/c.area_m2

@few
@given(seeds)
def test_clip_for_any_seed(seed):
    "The zone is in the picture, its heads are large, the site file tells the true camera"
    c = clip(120, 8, seed)
    border = c.heads(c.zone_m)
    feet = c.view.to_px(np.column_stack([c.zone_m, [0]*4]))
    assert all(((o > 0) & (o < (640, 480))).all() for o in (border, feet))
    assert (c.view.focal_px*HEAD_M/c.view.depth(np.column_stack([c.zone_m, [1.6]*4]))).min() >= 8
    camera, = tomllib.loads(site_toml(c))['camera']
    px, m = (np.array(camera['ground'][k]) for k in ('points_px', 'points_m'))
    assert len(px) >= 4 and ((px >= 0) & (px < (640, 480))).all()
    np.testing.assert_allclose(c.view.to_ground(px), m, atol=.02)
    np.testing.assert_allclose(camera['zone'][0]['polygon_m'], c.zone_m, atol=.001)
    assert camera['ground']['camera_height_m'] == pytest.approx(c.view.height_m, abs=.001)

@few
@given(seeds, st.floats(0, 119))
@example(1546558393, 14.5625)
def test_people_walk(seed, t):
    "Nobody jumps, and velocities are those of the places"
    c = clip(120, 2, seed)
    (a, v, i), (b, _, j) = c._walk(t), c._walk(t+.01)
    both, ia, jb = np.intersect1d(i, j, return_indices=True)
    step = (b[jb]-a[ia])/.01
    passing = np.abs(step).max(1) > 100 # who passes by comes back on the other side
    assert passing.sum() <= 1
    fine = ~passing & (np.abs(np.hypot(*step.T)-np.hypot(*v[ia].T)) < .1)
    assert (~passing & ~fine).sum() <= max(1, .05*len(both)), 'but for who sets off or stops in this very hundredth'
    assert np.hypot(*step[~passing].T).max(initial=0) < 2.5
    np.testing.assert_allclose(step[fine], v[ia][fine], atol=.1)

def test_filling_is_smooth():
    c = clip(120, 8, 3)
    curve = np.array([c.density(t) for t in range(121)])
    assert np.abs(np.diff(curve)).max() < .7
    top = curve.argmax()
    assert (np.diff(curve[:top]) > -.2).all() and (np.diff(curve[top+15:]) < .2).all()

def test_frames():
    c = clip(10, 4, 1, fps=2, size_hw=(120, 160))
    stream = c.frames()
    assert iter(stream) is stream, 'one picture at a time'
    film = list(stream)
    assert [f[0] for f in film] == [i/2 for i in range(20)]
    for t, rgb, xy, m in film:
        assert rgb.shape == (120, 160, 3) and rgb.dtype == np.uint8 and xy.dtype == m.dtype == np.float32 and len(xy) == len(m)
        np.testing.assert_allclose(c.heads(m), xy, atol=1e-2)
        assert ((xy >= 0) & (xy < (160, 120))).all() and synthetic._within(c.zone_m, m).sum() == c.people(t)
    for a, b in zip(film[::5], clip(10, 4, 1, fps=2, size_hw=(120, 160)).frames(every=5)): assert a[0] == b[0] and (a[1] == b[1]).all()
    assert (film[0][1] != film[9][1]).mean() > .1

def test_frames_are_fast():
    c = clip(120, 8, 0)
    start, n = time.process_time(), 0
    for n, _ in enumerate(c.frames(every=48)): pass
    assert (time.process_time()-start)/(n+1) < .2 # about .05 here, where few sprites are used twice

@pytest.mark.parametrize('bad', (dict(seconds=0), dict(peak=-1), dict(peak=11), dict(fps=0), dict(seconds=float('nan')), dict(size_hw=(8, 8))))
def test_clip_refuses(bad):
    with pytest.raises(ValueError, match='expected .* found'): clip(**bad)

def test_alter():
    pictures = [(float(t), np.full((2, 2, 3), t, np.uint8), 'more') for t in range(10)]
    out = list(alter(iter(pictures), [('black', 1, 3), ('missing', 4, 6), ('frozen', 7, 9)]))
    assert [(t, int(rgb[0, 0, 0])) for t, rgb, _ in out] == [(0, 0), (1, 0), (2, 0), (3, 3), (6, 6), (7, 6), (8, 6), (9, 9)]
    assert all(more == 'more' for *_, more in out) and pictures[1][1].max() == 1, 'the originals stay as they are'
    with pytest.raises(ValueError, match='expected'): alter([], [('dark', 0, 1)])

def times_of(path):
    film, out = cv2.VideoCapture(str(path)), []
    while film.read()[0]: out.append(film.get(cv2.CAP_PROP_POS_MSEC)/1000)
    return out

@pytest.mark.parametrize('faults', ((), [('missing', 2, 4)], [('missing', 0, 1), ('missing', 4, 4.5), ('black', 5, 6)]))
def test_write_clip(tmp_path, faults):
    c = write_clip(tmp_path/'a b', 8, 3, seed=2, fps=2, size_hw=(120, 160), faults=faults, progress=lambda o, text: o)
    assert sorted(p.name for p in (tmp_path/'a b').iterdir()) == ['clip.mp4', 'site.toml', 'truth.csv']
    with open(tmp_path/'a b'/'truth.csv', newline='') as f: rows = list(csv.DictReader(f))
    times = [t for t in c.times if not any(k == 'missing' and a <= t < b for k, a, b in faults)]
    assert list(rows[0]) == ['time', 'zone', 'people', 'density'] and [float(r['time']) for r in rows] == times
    for r in rows:
        assert int(r['people']) == c.people(float(r['time'])) and float(r['density']) == pytest.approx(int(r['people'])/c.area_m2, abs=1e-4)
    np.testing.assert_allclose(np.array(times_of(tmp_path/'a b'/'clip.mp4')), np.array(times)-times[0], atol=.01)

def test_film_shows_the_frames(tmp_path):
    c = write_clip(tmp_path, 4, 4, seed=1, fps=2)
    film = cv2.VideoCapture(str(tmp_path/'clip.mp4'))
    for t, rgb, *_ in c.frames():
        ok, bgr = film.read()
        assert ok and np.abs(bgr[..., ::-1].astype(int)-rgb).mean() < 8

def test_broken_off_clip_leaves_the_old_one(tmp_path, monkeypatch):
    write_clip(tmp_path, 2, 1, fps=2, size_hw=(64, 96))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def breaks(self, every=1):
        yield 0., np.zeros((64, 96, 3), np.uint8), None, None
        raise OSError('no space left')
    monkeypatch.setattr(synthetic.Clip, 'frames', breaks)
    with pytest.raises(OSError, match='no space'): write_clip(tmp_path, 2, 5, fps=2, size_hw=(64, 96))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

def test_truth_rows():
    c = clip(60, 4)
    assert truth_rows(c, [])[0] == ('time', 'zone', 'people', 'density')
    assert truth_rows(c, [28.])[1] == ('28.000', 'stage', c.people(28.), f'{c.density(28.):.4f}')

def test_site_is_read_by_ground(tmp_path):
    "The next room reads the site file and finds the camera in it"
    ground = pytest.importorskip('crowd_density.ground')
    c = clip(20, 4, seed=6)
    (tmp_path/'site.toml').write_text(site_toml(c))
    camera = ground.read_site(tmp_path/'site.toml').cameras[0]
    assert camera.name == 'square' and camera.zones[0].name == 'stage'
    g = ground.Ground.fit(*(np.array(tomllib.loads(site_toml(c))['camera'][0]['ground'][k]) for k in ('points_px', 'points_m')), camera_height_m=c.view.height_m)
    feet = np.random.default_rng(0).uniform(c.zone_m.min(0), c.zone_m.max(0), (50, 2))
    np.testing.assert_allclose(g.to_ground(c.view.to_px(np.column_stack([feet, np.zeros(50)]))), feet, atol=.03)

def test_needs_no_torch():
    code = "import sys, crowd_density.synthetic; print([m for m in ('torch', 'torchvision', 'fastai', 'timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
