"Room 00: what is read, what is refused, how every layout pairs, and splits that do not leak"
import json, os, subprocess, sys, threading, warnings
from collections import Counter, defaultdict
from copy import copy
from pathlib import Path

import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from scipy.io import savemat

from crowd_density import data as D
from crowd_density.data import CrowdData, DataError, EXCLUDED, Item, LAYOUTS, atomic, check, grouped_split, image_size
from crowd_density.data import inside, look_alikes, open_data, points_from_marks, read_points, read_rgb, shipped_split
from crowd_density.data import split_of, training_items, write_split

ROOT = Path(__file__).parents[1]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HEADS = np.float32([[10, 20.5], [63, 0], [0, 47]])

def pixels(size_hw=(48, 64), seed=0):
    "Smooth random pixels"
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.array(Image.fromarray(small).resize(size_hw[::-1], Image.BICUBIC))

def picture(path, size_hw=(48, 64), seed=0, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(size_hw, seed)).save(path, **kwargs)
    return path

def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding='utf-8')
    return path

def mat(path, **variables):
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables)
    return path

def shanghai(path, points, count=None):
    info = np.empty((1, 1), object)
    info[0, 0] = dict(location=np.asarray(points, float) + 1, number=len(points) if count is None else count)
    return mat(path, image_info=info)

def refused(f, *parts):
    "`f` raises a `DataError` whose message has all `parts`"
    with pytest.raises(DataError) as e: f()
    for p in parts: assert p in str(e.value), f'{p!r} is not in {e.value}'

# Errors and files

def test_error_is_a_value_error_that_survives_copies_and_processes():
    from concurrent.futures import ProcessPoolExecutor
    e = DataError('a b.jpg', 'this', 'that')
    assert isinstance(e, ValueError) and str(copy(e)) == str(e) == 'a b.jpg: expected this, found that'
    with ProcessPoolExecutor(1) as pool, pytest.raises(DataError, match='nowhere.jpg: expected a picture'):
        pool.submit(read_rgb, 'nowhere.jpg').result()

def test_atomic_is_all_or_nothing(tmp_path):
    target = tmp_path/'new folder'/'ü.txt'
    with atomic(target) as t:
        assert (t.parent, t.suffix) == (target.parent, target.suffix) and t != target
        t.write_text('one')
    with pytest.raises(OSError, match='No space'), atomic(target) as t:
        t.write_text('two')
        raise OSError(28, 'No space left on device')
    with pytest.raises(OSError) as e, atomic(target) as t: raise OSError(28, 'No space left on device', str(t))
    assert e.value.filename == str(target)
    with pytest.raises(FileNotFoundError, match='other.txt'), atomic(target) as t: (tmp_path/'other.txt').read_text()
    with pytest.raises(KeyboardInterrupt), atomic(target) as t: raise KeyboardInterrupt
    assert target.read_text() == 'one' and list(target.parent.iterdir()) == [target]

def test_atomic_keeps_the_usual_permissions(tmp_path):
    with atomic(tmp_path/'a.txt') as t: t.write_text('a')
    (tmp_path/'b.txt').write_text('b')
    assert (tmp_path/'a.txt').stat().st_mode == (tmp_path/'b.txt').stat().st_mode

def test_atomic_by_many_threads(tmp_path):
    def write(i):
        with atomic(tmp_path/'a.txt') as t: t.write_text(str(i) * 1000)
    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    content = (tmp_path/'a.txt').read_text()
    assert len(content) == 1000 and len(set(content)) == 1 and len(list(tmp_path.iterdir())) == 1

def test_atomic_into_a_file_as_folder(tmp_path):
    text(tmp_path/'file', 'kept')
    with pytest.raises(OSError), atomic(tmp_path/'file'/'a.txt') as t: t.write_text('a')
    assert (tmp_path/'file').read_text() == 'kept'

# Pictures

def test_exact_pixels_of_lossless_pictures(tmp_path):
    rgb = pixels()
    for name in ('a.png', 'a.bmp', 'a.tiff', 'ein Bild mit Straße 人.png', 'A.PNG'):
        Image.fromarray(rgb).save(tmp_path/name)
        assert (read_rgb(tmp_path/name) == rgb).all() and image_size(tmp_path/name) == (48, 64)

@pytest.mark.parametrize('mode, suffix', [
    ('L', 'png'), ('1', 'png'), ('LA', 'png'), ('RGBA', 'png'), ('P', 'png'), ('P', 'gif'), ('CMYK', 'jpg'),
    ('CMYK', 'tif'), ('YCbCr', 'jpg'), ('RGB', 'webp'), ('HSV', 'jpg')])
def test_every_mode_is_near_its_rgb(tmp_path, mode, suffix):
    im = Image.fromarray(pixels()).convert(mode)
    path = tmp_path/f'a.{suffix}'
    (im.convert('RGB') if mode == 'HSV' else im).save(path, **({'quality': 95} if suffix in ('jpg', 'webp') else {}))
    x = read_rgb(path)
    assert x.shape == (48, 64, 3) and x.dtype == np.uint8
    assert np.abs(x.astype(int) - np.array(im.convert('RGB')).astype(int)).mean() < 12

@pytest.mark.parametrize('dtype', [np.uint16, np.int32, np.float32])
def test_deep_greys_keep_their_brightness(tmp_path, dtype):
    a = np.linspace(0, 65535, 48 * 64).reshape(48, 64)
    Image.fromarray((a / 65535 if dtype == np.float32 else a).astype(dtype)).save(tmp_path/'a.tif')
    x = read_rgb(tmp_path/'a.tif')
    assert np.abs(x[..., 0] - a / 257).max() <= 1 and (x[..., 0] == x[..., 2]).all()

def test_sixteen_bit_colour(tmp_path):
    import cv2
    rgb = pixels()
    cv2.imwrite(str(tmp_path/'a.png'), rgb[..., ::-1].astype(np.uint16) * 257)
    assert np.abs(read_rgb(tmp_path/'a.png').astype(int) - rgb).max() <= 1

def test_floating_greys_out_of_range_are_refused(tmp_path):
    Image.fromarray(np.full((48, 64), 1e6, np.float32)).save(tmp_path/'a.tif')
    refused(lambda: read_rgb(tmp_path/'a.tif'), 'a.tif', '0 to 1 or 0 to 255')

@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_rotation_is_not_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    picture(tmp_path/'a.jpg', exif=exif, quality=95)
    assert image_size(tmp_path/'a.jpg') == (48, 64)
    assert np.abs(read_rgb(tmp_path/'a.jpg').astype(int) - pixels()).mean() < 5

@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P', 'L', 'CMYK'])
def test_strips_are_the_whole(mode):
    im = Image.fromarray(pixels((1100, 40))).convert(mode)
    assert (D._rgb_by_strips(im, 512) == np.array(im.convert('RGB'))).all()

def test_large_picture(tmp_path):
    Image.new('RGB', (8000, 6000), (10, 200, 30)).save(tmp_path/'a.jpg', quality=60)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        x = read_rgb(tmp_path/'a.jpg')
    assert x.shape == (6000, 8000, 3) and abs(int(x[5999, 7999, 1]) - 200) < 4

def test_hundred_megapixels_without_warning_and_bombs_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Image.new('1', (10000, 10000)).save(tmp_path/'a.png')
        assert image_size(tmp_path/'a.png') == (10000, 10000)
    Image.new('1', (20000, 10000)).save(tmp_path/'bomb.png')
    refused(lambda: read_rgb(tmp_path/'bomb.png'), 'bomb.png', '178 megapixels')

def test_refused_pictures(tmp_path):
    whole = picture(tmp_path/'whole.jpg', (256, 256)).read_bytes()
    png = picture(tmp_path/'whole.png', (256, 256)).read_bytes()
    for name, content, found in [('text.jpg', b'this is text', 'no known format'), ('empty.png', b'', '0 bytes'),
                                 ('cut.jpg', whole[:2000], 'truncated'), ('cut.png', png[:len(png) // 2], ''),
                                 ('headonly.jpg', whole[:30], '')]:
        (tmp_path/name).write_bytes(content)
        refused(lambda: read_rgb(tmp_path/name), name, 'expected', found)
    refused(lambda: read_rgb(tmp_path/'missing.jpg'), 'missing.jpg', 'no such file')
    refused(lambda: read_rgb(tmp_path), 'a folder')
    refused(lambda: image_size(tmp_path/'text.jpg'), 'text.jpg')

@pytest.mark.parametrize('size_hw', [(31, 64), (64, 31), (1, 1)])
def test_small_pictures_are_refused(tmp_path, size_hw):
    picture(tmp_path/'a.png', size_hw)
    refused(lambda: read_rgb(tmp_path/'a.png'), 'at least 32 px', f'{size_hw[1]}x{size_hw[0]}')
    assert read_rgb(tmp_path/'a.png', min_side=1).shape[:2] == size_hw

def test_smallest_picture(tmp_path): assert read_rgb(picture(tmp_path/'a.png', (32, 32))).shape == (32, 32, 3)

def test_opencv_reads_a_cut_jpeg_and_we_do_not(tmp_path):
    "Why `read_rgb` is Pillow's"
    import cv2
    (tmp_path/'cut.jpg').write_bytes(picture(tmp_path/'whole.jpg', (256, 256)).read_bytes()[:2000])
    half_grey = cv2.imread(str(tmp_path/'cut.jpg'))
    assert half_grey is None or half_grey.shape == (256, 256, 3)
    refused(lambda: read_rgb(tmp_path/'cut.jpg'), 'truncated')

@given(st.binary(max_size=200))
@quick
def test_any_bytes_are_read_or_refused(tmp_path, content):
    (tmp_path/'a.jpg').write_bytes(content)
    refused(lambda: read_rgb(tmp_path/'a.jpg'), 'a.jpg')

def test_missing_system_library_names_the_package(monkeypatch):
    class Broken:
        def find_spec(self, name, *args):
            if name == 'cv2': raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')
    monkeypatch.delitem(sys.modules, 'cv2', raising=False)
    monkeypatch.setattr(sys, 'meta_path', [Broken(), *sys.meta_path])
    with pytest.raises(ImportError) as e: D.load_cv2()
    for part in ('libGL.so.1', 'libgl1', 'libglib2.0-0', 'opencv-python-headless'): assert part in str(e.value)

NEED_CV2 = 'synthetic preprocessing autoencoder segmentation counting evaluation inference watch serve report'

@pytest.mark.parametrize('room', NEED_CV2.split())
def test_every_room_says_what_a_bare_server_lacks(room, tmp_path):
    "A plain `import crowd_density.<room>` where libGL is missing names the Debian package and the other wheel"
    (tmp_path/'cv2.py').write_text('raise ImportError("libGL.so.1: cannot open shared object file")')
    env = os.environ | {'PYTHONPATH': f'{tmp_path}{os.pathsep}{ROOT}'}
    r = subprocess.run([sys.executable, '-c', f'import crowd_density.{room}'], env=env, capture_output=True, text=True)
    last = r.stderr.strip().splitlines()[-1]
    assert r.returncode and last.startswith('ImportError: OpenCV does not load (libGL.so.1')
    assert 'apt-get install libgl1 libglib2.0-0' in last and 'pip install opencv-python-headless' in last

def test_the_room_loads_without_opencv_and_torch():
    code = ("import sys; sys.modules.update(cv2=None, torch=None, fastai=None, timm=None, torchvision=None); "
            "import crowd_density.data as d; assert d._natural('a10') > d._natural('a9'); print('fine')")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == 'fine\n'

# Points

coordinates = st.floats(0, 5000, width=32)
clouds = st.lists(st.tuples(coordinates, coordinates), max_size=30)

@given(clouds)
@quick
def test_points_come_back_from_every_format(tmp_path, points):
    p = np.float32(points).reshape(-1, 2)
    files = [shanghai(tmp_path/'a.mat', p), mat(tmp_path/'b_ann.mat', annPoints=p.astype(float) + 1),
             text(tmp_path/'c.csv', 'x,y\n' + ''.join(f'{x},{y}\n' for x, y in p.tolist())),
             text(tmp_path/'d.json', json.dumps(p.tolist())),
             text(tmp_path/'e.json', json.dumps(dict(points=p.tolist()))),
             text(tmp_path/'f.csv',
                  'file,x,y\n' + ''.join(f'ä b.jpg,{x},{y}\n' for x, y in p.tolist()) + 'ä b.jpg,,\nother.jpg,1,1\n'),
             text(tmp_path/'g.json', json.dumps({'ä b.jpg': p.tolist(), 'other.jpg': [[1, 1]]}))]
    for f in files:
        q = read_points(f, image=tmp_path/'somewhere'/'ä b.jpg')
        assert q.dtype == np.float32 and q.shape == (len(p), 2), f
        np.testing.assert_allclose(q, p, atol=2e-3, err_msg=str(f))

@pytest.mark.parametrize('name, content', [
    ('a.csv', '1,2\n3,4\n'), ('a.csv', 'x,y\n1,2\n3,4\n'), ('a.csv', '\ufeffx,y\r\n1,2\r\n\r\n3,4\r\n'),
    ('a.csv', 'x;y\n1;2\n3;4\n'),
    ('a.csv', 'file,x,y\np.jpg,1,2\np.jpg,3,4\n'), ('a.csv', 'p.jpg,1,2\np.jpg,3,4\n'),
    ('a.csv', 'y,x,file\n2,1,p.jpg\n4,3,p.jpg\n'),
    ('a.csv', 'file,x,y\nfolder\\p.jpg,1,2\nfolder/p.jpg,3,4\n'), ('a.json', '[{"x": 1, "y": 2}, {"x": 3, "y": 4}]'),
    ('a.json', '{"p.jpg": {"points": [[1, 2], [3, 4]]}}'),
    ('a.json', '[{"file": "p.jpg", "x": 1, "y": 2}, {"file": "p.jpg", "x": 3, "y": 4}]'),
    ('a.json',
     '{"shapes": [{"shape_type": "point", "points": [[1, 2]]}, {"shape_type": "line", "points": [[2, 3], [4, 5]]}]}'),
    ('a.json', '{"img_id": "p.jpg", "human_num": 2, "points": [[1, 2], [3, 4]], "boxes": []}'),
    ('a.txt', '1 2 10 10 1 0\n3 4 9 9 2 1\n'),
    ('a.txt', '1 2\n3,4\n')])
def test_spellings_of_two_points(tmp_path, name, content):
    path = tmp_path/name
    path.write_bytes(content.encode())
    assert read_points(path, image='p.jpg').tolist() == [[1, 2], [3, 4]]
    if 'file' in content or 'p.jpg,' in content: assert read_points(path).tolist() == [[1, 2], [3, 4]]

@pytest.mark.parametrize('name, content', [('a.csv', ''), ('a.csv', 'x,y\n'), ('a.csv', 'file,x,y\np.jpg,,\n'),
                                           ('a.json', '[]'), ('a.txt', ''),
                                           ('a.json', '{"p.jpg": []}')])
def test_nobody(tmp_path, name, content):
    path = text(tmp_path/name, content)
    assert read_points(path, image='p.jpg').shape == (0, 2)

def test_empty_mats(tmp_path):
    for shape in ((0, 0), (0, 2)): assert read_points(mat(tmp_path/'a.mat', annPoints=np.zeros(shape))).shape == (0, 2)
    assert read_points(shanghai(tmp_path/'b.mat', np.zeros((0, 2)))).shape == (0, 2)

def test_names_in_either_unicode_form(tmp_path):
    composed, decomposed = 'Stra\u00dfe \u00fc.jpg', 'Stra\u00dfe u\u0308.jpg'
    path = text(tmp_path/'a.csv', f'file,x,y\n{decomposed},1,2\n')
    assert read_points(path, image=composed).tolist() == read_points(path, image=decomposed).tolist() == [[1, 2]]

def test_matlab_counts_from_one(tmp_path):
    path = mat(tmp_path/'a.mat', annPoints=np.array([[1, 1], [.25, 0], [640, 480.5]]))
    assert read_points(path).tolist() == [[0, 0], [0, 0], [639, 479.5]]

@pytest.mark.parametrize('suffix', ['mat', 'csv', 'json', 'txt'])
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -3])
def test_nan_and_negative_points_are_refused(tmp_path, suffix, bad):
    points = [[5, 5], [7, bad]]
    path = tmp_path/f'a.{suffix}'
    if suffix == 'mat': mat(path, annPoints=np.float64(points))
    else: text(path, json.dumps(points) if suffix == 'json' else '\n'.join(f'{x},{y}' for x, y in points))
    refused(lambda: read_points(path), path.name, 'negative' if bad == -3 else 'finite')

def test_negative_points_may_be_kept_for_counting_them(tmp_path):
    path = text(tmp_path/'a.csv', 'x,y\n-3,4\n5,5\n')
    assert len(inside(read_points(path, negative='keep'), (48, 64))) == 1

@pytest.mark.parametrize('name, content, found', [
    ('a.mat', 'text', 'a readable .mat file'), ('a.mat', '', '0 bytes'), ('a.json', '', '0 bytes'),
    ('a.json', '{"points": [', 'JSON'),
    ('a.json', '{"points": 7}', 'points'), ('a.json', '[[1], [2]]', '(n, 2)'), ('a.json', '[["a", "b"]]', 'numbers'),
    ('a.json', '7', 'points'),
    ('a.csv', 'x,y\n1,2\n3,four\n', 'line 3'), ('a.csv', 'x,y\n1\n', 'line 2'),
    ('a.csv', 'file,x,y\nq.jpg,1,2\n', 'points of p.jpg'),
    ('a.txt', 'one two', 'numbers'), ('a.txt', '7\n', 'two numbers'), ('a.xml', '<a/>', '.xml'),
    ('a', '1,2', 'no suffix')])
def test_refused_annotations(tmp_path, name, content, found):
    refused(lambda: read_points(text(tmp_path/name, content), image='p.jpg'), name, found)

def test_refused_mats(tmp_path):
    refused(lambda: read_points(mat(tmp_path/'a.mat', something=np.eye(2))), 'a.mat', 'image_info', 'found something')
    refused(lambda: read_points(mat(tmp_path/'b.mat', image_info=np.eye(2))), 'b.mat')
    refused(lambda: read_points(mat(tmp_path/'c.mat', annPoints=np.ones((5, 3)))), 'c.mat', '(5, 3)')
    whole = shanghai(tmp_path/'d.mat', HEADS).read_bytes()
    (tmp_path/'cut.mat').write_bytes(whole[:len(whole) // 2])
    refused(lambda: read_points(tmp_path/'cut.mat'), 'cut.mat')
    (tmp_path/'new.mat').write_bytes(b'MATLAB 7.3 MAT-file'.ljust(124) + b'\x00\x02IM' + b'\x89HDF\r\n\x1a\n')
    refused(lambda: read_points(tmp_path/'new.mat'), 'new.mat', '-v7')
    refused(lambda: read_points(tmp_path/'gone.mat'), 'gone.mat', 'No such file')

def test_not_utf8_is_refused(tmp_path):
    (tmp_path/'a.csv').write_bytes('file,x,y\nä.jpg,1,2\n'.encode('latin-1'))
    refused(lambda: read_points(tmp_path/'a.csv', image='ä.jpg'), 'a.csv', 'UTF-8')

def test_a_changed_file_is_read_again(tmp_path):
    path = text(tmp_path/'a.csv', 'x,y\n1,2\n')
    assert len(read_points(path)) == 1
    text(path, 'x,y\n1,2\n3,4\n')
    assert len(read_points(path)) == 2

def test_a_shared_table_needs_the_picture(tmp_path):
    path = text(tmp_path/'a.csv', 'file,x,y\na.jpg,1,2\nb.jpg,3,4\n')
    refused(lambda: read_points(path), 'to say of which', '2 pictures')

def test_one_bad_row_spoils_its_picture_only(tmp_path):
    path = text(tmp_path/'a.csv', 'file,x,y\na.jpg,1,oops\nb.jpg,3,4\n')
    refused(lambda: read_points(path, image='a.jpg'), 'line 2')
    assert read_points(path, image='b.jpg').tolist() == [[3, 4]]

@given(clouds, st.integers(1, 3000), st.integers(1, 3000))
@quick
def test_inside_against_the_definition(points, h, w):
    kept = [(x, y) for x, y in points if 0 <= x < w and 0 <= y < h]
    assert inside(points, (h, w)).tolist() == np.float32(kept).reshape(-1, 2).tolist()
    clipped = inside(points, (h, w), outside='clip')
    assert len(clipped) == len(points) == len(inside(clipped, (h, w)))

# Points from marks

def marked(original, centres, shape, colour=(255, 0, 0)):
    import cv2
    m = original.copy()
    for x, y in centres.astype(int):
        p = int(x), int(y)
        if shape == 'dot': cv2.circle(m, p, 4, colour, -1)
        elif shape == 'ring': cv2.circle(m, p, 5, colour, 1)
        elif shape == 'square': cv2.rectangle(m, (p[0] - 2, p[1] - 2), (p[0] + 2, p[1] + 2), colour, -1)
        else: cv2.drawMarker(m, p, colour, cv2.MARKER_CROSS if shape == 'cross' else cv2.MARKER_TILTED_CROSS, 9, 2)
    return m

def apart(rng, size_hw, n, distance=14, border=8):
    "Random centres that keep their distance"
    out = []
    for _ in range(n * 30):
        p = rng.integers([border, border], [size_hw[1] - border, size_hw[0] - border])
        if all(np.hypot(*(p - q)) >= distance for q in out): out.append(p)
        if len(out) == n: break
    return np.array(out, np.float32).reshape(-1, 2)

def matched(found, true, within=1.5):
    "Whether found and true points are the same, within some pixels"
    d = np.hypot(*np.moveaxis(found[:, None] - true[None], -1, 0)) if len(found) and len(true) else np.zeros((0, 0))
    return len(found) == len(true) and (not len(true) or (d.min(0).max() <= within and d.min(1).max() <= within))

@pytest.mark.parametrize('shape', ['dot', 'ring', 'square', 'cross', 'x'])
@pytest.mark.parametrize('seed', range(3))
def test_marks_are_found(tmp_path, shape, seed):
    rng, original = np.random.default_rng(seed), pixels((300, 400), seed)
    centres = apart(rng, (300, 400), 60, 18)
    assert matched(points_from_marks(marked(original, centres, shape), original), centres)

@pytest.mark.parametrize('quality', [95, 85])
def test_marks_in_a_jpeg(tmp_path, quality):
    rng, original = np.random.default_rng(1), pixels((300, 400), 1)
    centres = apart(rng, (300, 400), 40, 24)
    Image.fromarray(marked(original, centres, 'dot')).save(tmp_path/'m.jpg', quality=quality)
    Image.fromarray(original).save(tmp_path/'o.png')
    assert matched(points_from_marks(tmp_path/'m.jpg', tmp_path/'o.png'), centres)

@pytest.mark.parametrize('seed', [0, 1])
def test_marks_on_generated_scenes(tmp_path, seed):
    synthetic = pytest.importorskip('crowd_density.synthetic')
    s = synthetic.scene(seed, size_hw=(480, 640))
    p = np.round(s.points_xy)
    p = p[((p >= 8) & (p < [632, 472])).all(1)]
    alone = np.array([(np.hypot(*(p - q).T) < 12).sum() == 1 for q in p])
    found = points_from_marks(marked(s.rgb, p, 'dot'), s.rgb)
    d = np.hypot(*np.moveaxis(found[:, None] - p[alone][None], -1, 0))
    assert alone.sum() > 3 and d.min(0).max() <= 1.5

def test_no_marks_and_other_sizes():
    original = pixels()
    assert points_from_marks(original, original).shape == (0, 2)
    refused(lambda: points_from_marks(original[:40], original), 'marked picture', '(48, 64, 3)', '(40, 64, 3)')

# Layouts

def shanghaitech(root, part='part_A', half='train_data', images='images', truth='ground-truth', numbers=(1, 2, 10),
                 heads=HEADS):
    for n in numbers:
        picture(root/part/half/images/f'IMG_{n}.jpg', seed=n)
        shanghai(root/part/half/truth/f'GT_IMG_{n}.mat', heads[:1 + n % len(heads)])
    return root

def write_ucf_cc_50(root):
    for n in (1, 2, 10):
        picture(root/f'{n}.jpg', seed=n)
        mat(root/f'{n}_ann.mat', annPoints=HEADS[:1 + n % 3] + 1.)

def write_ucf_qnrf(root):
    for half, numbers in (('Train', (1, 2)), ('Test', (10,))):
        for n in numbers:
            picture(root/half/f'img_{n:04}.jpg', seed=n)
            mat(root/half/f'img_{n:04}_ann.mat', annPoints=HEADS[:1 + n % 3] + 1.)

def write_mall(root, truth='mall_gt.mat', numbers=(1, 2, 10)):
    frames = np.empty((1, 10), object)
    for i in range(10): frames[0, i] = dict(loc=HEADS[:1 + (i + 1) % 3] + 1.)
    mat(root/truth, frame=frames, count=np.array([[1 + (i + 1) % 3] for i in range(10)], float))
    mat(root/'perspective_roi.mat', pMapN=np.ones((48, 64)), roi=dict(mask=np.ones((48, 64))))
    for n in numbers: picture(root/'frames'/f'seq_{n:06}.jpg', seed=n)

def write_jhu(root):
    for half, n in (('train', 1), ('val', 2), ('test', 10)):
        picture(root/half/'images'/f'{n:04}.jpg', seed=n)
        text(root/half/'gt'/f'{n:04}.txt', ''.join(f'{x} {y} 12 15 1 0\n' for x, y in HEADS[:1 + n % 3].tolist()))
        text(root/half/'image_labels.txt', f'{n:04},{1 + n % 3},street,0,0\n')

def write_nwpu(root, kind='jsons'):
    for half, n in (('train', 1), ('val', 2), ('test', 10)):
        p, name = HEADS[:1 + n % 3], f'{n:04}'
        picture(root/'images'/f'{name}.jpg', seed=n)
        if kind == 'jsons':
            d = dict(img_id=f'{name}.jpg', human_num=len(p), points=p.tolist(),
                     boxes=[[x, y, x + 9, y + 9] for x, y in p.tolist()])
            text(root/'jsons'/f'{name}.json', json.dumps(d))
        else: mat(root/'mats'/f'{name}.mat', annPoints=p.astype(float), annBoxes=np.c_[p, p + 9].astype(float))
        text(root/f'{half}.txt', f'{name} 1 2\n')

def coco(pictures, shape='bbox'):
    "COCO JSON for {file name: points}"
    d = dict(images=[dict(id=i, file_name=f, height=48, width=64) for i, f in enumerate(pictures)], annotations=[],
             categories=[dict(id=1, name='person'), dict(id=2, name='car')])
    for i, points in enumerate(pictures.values()):
        for x, y in np.asarray(points).tolist():
            a = dict(id=len(d['annotations']), image_id=i, category_id=1)
            a |= dict(bbox=dict(bbox=[x - 3, y - 4, 6, 8]), keypoints=dict(keypoints=[0, 0, 0, x, y, 2]),
                      point=dict(point=[x, y]))[shape]
            d['annotations'].append(a)
        d['annotations'] += [dict(id=900, image_id=i, category_id=2, bbox=[1, 1, 5, 5]),
                             dict(id=901, image_id=i, category_id=1, iscrowd=1, bbox=[0, 0, 9, 9])]
    return json.dumps(d)

def write_coco(root, shape='bbox'):
    for half, numbers in (('train2017', (1, 2)), ('val2017', (10,))):
        for n in numbers: picture(root/half/f'{n:012}.jpg', seed=n)
        text(root/'annotations'/f'instances_{half}.json',
             coco({f'{n:012}.jpg': HEADS[:1 + n % 3] for n in numbers}, shape))

def yolo_rows(points, h=48, w=64):
    shares = (np.asarray(points) / [w, h]).tolist()
    return ''.join(f'0 {x:.6f} {y:.6f} 0.1 0.1\n' for x, y in shares)

def write_yolo(root):
    text(root/'data.yaml', "train: images/train\nval: images/val\nnames:\n  0: head\n  1: hat\n")
    for half, n in (('train', 1), ('val', 2), ('test', 10)):
        picture(root/'images'/half/f'{n}.jpg', seed=n)
        text(root/'labels'/half/f'{n}.txt', yolo_rows(HEADS[:1 + n % 3]) + '1 0.5 0.5 0.1 0.1\n')

def write_points(root):
    rows = [f'{n}.jpg,{x},{y}\n' for n in (1, 2, 10) for x, y in HEADS[:1 + n % 3].tolist()]
    text(root/'heads.csv', 'file,x,y\n' + ''.join(rows))
    for n in (1, 2, 10): picture(root/f'{n}.jpg', seed=n)

WRITERS = dict(shanghaitech=shanghaitech, ucf_cc_50=write_ucf_cc_50, ucf_qnrf=write_ucf_qnrf, mall=write_mall)
WRITERS |= dict(jhu=write_jhu, nwpu=write_nwpu, coco=write_coco, yolo=write_yolo, points=write_points)
HALVES = dict(shanghaitech='train train train', ucf_cc_50='all all all', ucf_qnrf='train train test')
HALVES |= dict(mall='train train train', coco='train train valid', points='all all all')
HALVES |= dict.fromkeys(('jhu', 'nwpu', 'yolo'), 'train valid test')

def same_heads(data):
    "Each picture's points are those that were written for its number"
    for o in data: np.testing.assert_allclose(o.points(), HEADS[:1 + o.number % 3], atol=1e-3, err_msg=str(o))
    return True

def test_every_layout_is_tested(): assert set(WRITERS) == set(LAYOUTS)

@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('layout', WRITERS)
def test_layout(tmp_path, layout, nested):
    root = tmp_path/'a folder'/'set' if nested else tmp_path/'set'
    WRITERS[layout](root)
    data = open_data(root.parent if nested and layout not in ('yolo', 'points', 'coco') else root)
    assert data.layout == layout and {o.layout for o in data} == {layout}
    assert {o.number: o.split for o in data} == dict(zip((1, 2, 10), HALVES[layout].split()))
    assert same_heads(data) and all(o.rgb().shape == (48, 64, 3) for o in data)
    assert [o.number for o in open_data(root, layout=layout)] == [o.number for o in data]
    assert not [p for p in check(data) if p.unusable]

@pytest.mark.parametrize('part', ['part_A', 'part_A_final', 'part_a', 'A', 'partA', 'ShanghaiTech_A'])
@pytest.mark.parametrize('truth', ['ground-truth', 'ground_truth', 'groundtruth', 'Ground Truth', 'gt'])
@pytest.mark.parametrize('half', ['train_data', 'train'])
def test_spellings_of_shanghaitech(tmp_path, part, truth, half):
    data = open_data(shanghaitech(tmp_path, part, half, truth=truth))
    assert {(o.part, o.split) for o in data} == {('A', 'train')} and len(data) == 3 and same_heads(data)

@pytest.mark.parametrize('at', ['.', 'part_B_final', 'part_B_final/test_data', '..'])
def test_shanghaitech_from_any_height(tmp_path, at):
    root = shanghaitech(tmp_path/'ShanghaiTech', 'part_B_final', 'test_data', truth='ground_truth')
    data = open_data((root/at).resolve())
    assert {(o.part, o.split) for o in data} == {('B', 'test')} and len(data) == 3

def test_both_parts_and_halves(tmp_path):
    for part in ('part_A', 'part_B'):
        for half in ('train_data', 'test_data'): shanghaitech(tmp_path, part, half)
    data = open_data(tmp_path)
    assert len(data) == 12 and len(open_data(tmp_path, part='B')) == 6 and len(data.select('A', 'test')) == 3
    refused(lambda: open_data(tmp_path, part='C'), 'part C', 'parts A, B')
    assert len(split_of(data, 'test')) == 6 and sum(len(split_of(data, s)) for s in ('train', 'tune', 'valid')) == 6

def test_strays_shift_nothing(tmp_path):
    root = shanghaitech(tmp_path, numbers=(1, 2, 3, 10, 20))
    images, truth = root/'part_A/train_data/images', root/'part_A/train_data/ground-truth'
    for name in ('000.png', 'Thumbs.db', 'IMG_1.txt'): (images/name).touch()
    for name in ('notes.mat', 'Thumbs.db', 'GT_IMG_99.mat'): (truth/name).touch()
    data = open_data(root)
    assert [o.number for o in data] == [1, 2, 3, 10, 20] and same_heads(data)
    strays = ['000.png', 'GT_IMG_99.mat', 'IMG_1.txt', 'Thumbs.db', 'Thumbs.db', 'notes.mat']
    assert sorted(p.name for p in data.strays) == strays

@pytest.mark.parametrize('twin', ['IMG_2.png', 'IMG_02.jpg', 'IMG_2.JPG'])
def test_two_pictures_of_one_number(tmp_path, twin):
    root = shanghaitech(tmp_path)
    picture(root/'part_A/train_data/images'/twin)
    data = open_data(root)
    twins = [o for o in data if o.fault]
    assert {o.name for o in twins} == {'IMG_2.jpg', twin} and len(data) == 4
    for o in twins:
        refused(o.points, o.name, 'one picture of this name', 'also')
        refused(o.rgb, o.name)
    assert Counter(p.kind for p in check(data)) == {'ambiguous name': 2} and all(p.unusable for p in check(data))

def test_a_missing_annotation_is_one_items_matter(tmp_path):
    root = shanghaitech(tmp_path)
    (root/'part_A/train_data/ground-truth/GT_IMG_2.mat').unlink()
    data = open_data(root)
    assert [o.annotation is None for o in data] == [False, True, False]
    refused(data[1].points, 'IMG_2.jpg', 'an annotation')

@pytest.mark.parametrize('truth', ['mall_gt.mat', 'ground_truth.mat'])
def test_mall_names_and_halves(tmp_path, truth):
    write_mall(tmp_path, truth, (1, 2, 800, 801))
    data = open_data(tmp_path)
    assert [o.split for o in data] == ['train', 'train', 'train', 'test'] and data[1].count() == 3
    refused(data[3].points, truth, '1 to 10')

def test_mall_frames_as_a_struct_array(tmp_path):
    write_mall(tmp_path)
    frames = np.empty((1, 10), [('loc', object)])
    for i in range(10): frames[0, i]['loc'] = HEADS[:1 + (i + 1) % 3] + 1.
    mat(tmp_path/'mall_gt.mat', frame=frames)
    assert same_heads(open_data(tmp_path))

def test_mall_count_field(tmp_path):
    write_mall(tmp_path)
    frames = np.empty((1, 1), object)
    frames[0, 0] = dict(loc=HEADS + 1.)
    mat(tmp_path/'mall_gt.mat', frame=frames, count=np.array([[5]]))
    (tmp_path/'frames'/'seq_000002.jpg').unlink()
    (tmp_path/'frames'/'seq_000010.jpg').unlink()
    assert [(p.kind, p.detail) for p in check(tmp_path)] == [('count field', 'the file says 5 heads and has 3 points')]

def test_nwpu_mats_and_withheld_test(tmp_path):
    write_nwpu(tmp_path, 'mats')
    (tmp_path/'mats'/'0010.mat').unlink()
    data = open_data(tmp_path)
    assert data.layout == 'nwpu' and {o.number: o.split for o in data} == {1: 'train', 2: 'valid', 10: 'test'}
    assert same_heads(data[:2]) and data[2].annotation is None

def test_published_sets_may_have_points_beyond_the_border(tmp_path):
    picture(tmp_path/'1.jpg')
    mat(tmp_path/'1_ann.mat', annPoints=np.array([[5., 5], [-4, 7], [65, 3]]))
    item = open_data(tmp_path)[0]
    assert len(item.points()) == 3 and item.count() == 1
    assert [p.kind for p in check(tmp_path)] == ['outside the frame']

@pytest.mark.parametrize('shape', ['bbox', 'keypoints', 'point'])
def test_coco_shapes(tmp_path, shape):
    write_coco(tmp_path, shape)
    assert same_heads(open_data(tmp_path))

def test_coco_of_one_folder(tmp_path):
    "As Roboflow writes it: pictures and `_annotations.coco.json` together, in `train` and `valid`, file names twice"
    for half, n in (('train', 2), ('valid', 1)):
        picture(tmp_path/half/'a 1.jpg', seed=n)
        text(tmp_path/half/'_annotations.coco.json', coco({'a 1.jpg': HEADS[:n]}))
    data = open_data(tmp_path)
    assert {o.split: (o.count(), o.image.parent.name) for o in data} == {'train': (2, 'train'), 'valid': (1, 'valid')}

def test_coco_heads_before_people(tmp_path):
    d = json.loads(coco({'a.jpg': HEADS}))
    d['categories'].append(dict(id=3, name='Head'))
    d['annotations'].append(dict(id=999, image_id=0, category_id=3, bbox=[10, 10, 4, 4]))
    picture(tmp_path/'a.jpg')
    text(tmp_path/'all.json', json.dumps(d))
    assert open_data(tmp_path)[0].points().tolist() == [[12, 12]]

def test_coco_picture_that_is_not_there(tmp_path):
    picture(tmp_path/'a.jpg')
    text(tmp_path/'all.json', coco({'a.jpg': HEADS, 'gone.jpg': HEADS}))
    assert Counter(p.kind for p in check(tmp_path))['unreadable picture'] == 1

@pytest.mark.parametrize('names', ["names: ['hat', 'head']\n", 'nc: 2\nnames:\n- hat\n- head\n',
                                   'names:\n  0: hat\n  1: head\n'])
def test_yolo_class_names(tmp_path, names):
    text(tmp_path/'data.yaml', names)
    picture(tmp_path/'train/images/a.jpg')
    text(tmp_path/'train/labels/a.txt', '0 0.5 0.5 0.1 0.1\n1 0.25 0.75 0.1 0.1\n')
    data = open_data(tmp_path)
    assert data[0].split == 'train' and data[0].points().tolist() == [[16, 36]]

def test_yolo_without_names_counts_all_boxes_and_an_empty_file_is_nobody(tmp_path):
    for name, rows in (('a', '0 0.5 0.5 0.1 0.1\n1 0.25 0.75 0.1 0.1\n'), ('b', '')):
        picture(tmp_path/'images'/f'{name}.jpg')
        text(tmp_path/'labels'/f'{name}.txt', rows)
    picture(tmp_path/'images'/'c.jpg')
    data = open_data(tmp_path)
    assert [o.count() for o in data[:2]] == [2, 0] and data[2].annotation is None

@pytest.mark.parametrize('kind', ['beside', 'json', 'folder', 'table json', 'mat'])
def test_own_pictures(tmp_path, kind):
    names, points = ('a b.jpg', 'ü.png'), HEADS.tolist()
    for name in names: picture(tmp_path/('images' if kind == 'folder' else '')/name)
    if kind == 'table json': text(tmp_path/'heads.json', json.dumps({n: points for n in names}))
    for name in names if kind != 'table json' else ():
        stem = name.rsplit('.', 1)[0]
        if kind == 'json': text(tmp_path/f'{stem}.json', json.dumps(points))
        elif kind == 'mat': shanghai(tmp_path/f'{stem}.mat', HEADS)
        else: text(tmp_path/('points' if kind == 'folder' else '')/f'{stem}.csv',
                   'x,y\n' + ''.join(f'{x},{y}\n' for x, y in points))
    data = open_data(tmp_path)
    assert data.layout == 'points' and [o.name for o in data] == list(names) and [o.count() for o in data] == [3, 3]

def test_a_picture_that_the_table_does_not_name_is_unknown_not_empty(tmp_path):
    write_points(tmp_path)
    picture(tmp_path/'new.jpg')
    data = open_data(tmp_path)
    refused(next(o for o in data if o.name == 'new.jpg').points, 'new.jpg', 'an annotation')

def test_two_own_pictures_of_one_name(tmp_path):
    write_points(tmp_path)
    picture(tmp_path/'2.png')
    assert {o.name for o in open_data(tmp_path) if o.fault} == {'2.jpg', '2.png'}

def test_folders_that_are_no_data(tmp_path):
    refused(lambda: open_data(tmp_path/'missing'), 'missing', 'no such folder')
    refused(lambda: open_data(tmp_path), 'an empty folder')
    refused(lambda: open_data(text(tmp_path/'file.txt', 'x')), 'file.txt', 'a file')
    refused(lambda: open_data(tmp_path), 'annotated pictures', 'none')
    picture(tmp_path/'alone.jpg')
    refused(lambda: open_data(tmp_path), 'annotated pictures', 'none')
    refused(lambda: open_data(tmp_path, layout='unheard'), 'unheard', 'one of')
    (tmp_path/'part_A/train_data/images').mkdir(parents=True)
    (tmp_path/'part_A/train_data/ground-truth').mkdir()
    refused(lambda: open_data(tmp_path), 'annotated pictures')

def test_crowd_data_is_a_list(tmp_path):
    data = open_data(shanghaitech(tmp_path))
    assert isinstance(data[1:], CrowdData) and data[1:].root == tmp_path and isinstance(data[0], Item)
    assert '3 pictures' in repr(data) and len(data + data) == 6 and len(data.select('B')) == 0

# Splits

names = st.lists(st.integers(0, 10**6), min_size=1, max_size=80, unique=True)

@given(names, st.integers(1, 20), st.integers(0, 5), st.randoms())
@quick
def test_split_keeps_groups_and_forgets_the_order(numbers, every, seed, random):
    files = [f'IMG_{n}.jpg' for n in numbers]
    group = {f: n % every for f, n in zip(files, numbers)}
    def rows(fs):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            split = grouped_split(fs, seed=seed, groups=[group[f] for f in fs])
        return {r['file']: (r['group'], r['split']) for r in split}
    found, shuffled = rows(files), list(files)
    random.shuffle(shuffled)
    assert rows(shuffled) == found and list(found) == files
    sides = defaultdict(set)
    for g, s in found.values(): sides[g].add(s)
    assert all(len(s) == 1 for s in sides.values())
    count = Counter(s for _, s in found.values())
    assert count['valid'] <= max(1, round(.2 * len(files))) and count['tune'] <= max(1, round(.16 * len(files)))

@pytest.mark.parametrize('n', [50, 333])
def test_shares(n):
    count = Counter(r['split'] for r in grouped_split(range(n), groups=np.arange(n) // 2))
    assert abs(count['valid'] - .2 * n) <= 1.5 and abs(count['tune'] - .16 * n) <= 1.5

def test_seeds_differ_and_repeat():
    def split(seed): return [r['split'] for r in grouped_split(range(100), seed=seed, groups=range(100))]
    assert split(0) == split(0) != split(1)

def test_wrong_shares():
    with pytest.raises(ValueError, match='below 1'): grouped_split(range(9), valid=.9, tune=.2, groups=range(9))

def test_one_place_is_cut_with_a_warning():
    with pytest.warns(UserWarning, match='100 of 100 pictures'): rows = grouped_split(range(100), groups=[0] * 100)
    count = Counter(r['split'] for r in rows)
    assert count == dict(train=65, valid=20, tune=15) and len({r['group'] for r in rows}) == 20

def wall(seed, size_hw=(320, 448)):
    tiles = np.random.default_rng(seed).integers(0, 256, (size_hw[0] // 8, size_hw[1] // 8), np.uint8)
    return np.array(Image.fromarray(tiles).resize(size_hw[::-1], Image.BICUBIC))

def test_look_alikes(tmp_path):
    one, other = wall(0), wall(1)
    shots = [one[20:260, 30:350], one[60:300, 100:420], other[:240, :320], other[:240, :320][:, ::-1],
             wall(2)[:240, :320], wall(3)[:240, :320]]
    files = [tmp_path/f'IMG_{i}.png' for i in range(len(shots))]
    for f, s in zip(files, shots): Image.fromarray(s).save(f)
    Image.fromarray(shots[4]).save(tmp_path/'again.jpg', quality=60)
    Image.fromarray(shots[5]).resize((160, 120)).save(tmp_path/'small.jpg')
    groups = look_alikes([*files, tmp_path/'again.jpg', tmp_path/'small.jpg'])
    assert groups[0] == groups[1] and groups[2] == groups[3] and groups[4] == groups[6] and groups[5] == groups[7]
    assert len(set(groups)) == 4

def test_look_alikes_of_broken_and_flat_pictures(tmp_path):
    Image.new('RGB', (64, 64)).save(tmp_path/'black.png')
    Image.new('I;16', (64, 64), 40000).save(tmp_path/'deep.png')
    text(tmp_path/'text.jpg', 'text')
    picture(tmp_path/'a.png')
    names = 'black.png', 'deep.png', 'text.jpg', 'a.png', 'missing.jpg'
    assert len(set(look_alikes([tmp_path/n for n in names]))) == 5
    assert look_alikes([]).shape == (0,) and grouped_split([]) == []

def test_written_split_is_read_back(tmp_path):
    rows = grouped_split([f'/x/ü {i}.jpg' for i in range(10)], groups=range(10))
    write_split(rows, tmp_path/'s.csv')
    assert D.read_split(tmp_path/'s.csv') == {f'ü {i}.jpg': (r['group'], r['split']) for i, r in enumerate(rows)}
    assert (tmp_path/'s.csv').read_text('utf-8').startswith('file,group,split\nü 0.jpg,')

@pytest.mark.parametrize('part, n', [('A', 300), ('B', 400)])
def test_shipped_lists(part, n):
    split = shipped_split(part)
    assert set(split) == {f'IMG_{i}.jpg' for i in range(1, n + 1)}
    count, sides = Counter(s for _, s in split.values()), defaultdict(set)
    for g, s in split.values(): sides[g].add(s)
    assert all(len(s) == 1 for s in sides.values())
    for side, share in (('train', .64), ('tune', .16), ('valid', .2)): assert abs(count[side] / n - share) < .02

def test_near_duplicates_of_part_a_share_a_group():
    split = shipped_split('A')
    for a, b in ((167, 169), (118, 283)): assert split[f'IMG_{a}.jpg'] == split[f'IMG_{b}.jpg']

def test_exclusions():
    assert set(EXCLUDED) == {*(('A', 'train', n) for n in (2, 60, 97, 121, 139, 154)),
                             *(('B', 'train', n) for n in (108, 202, 296, 396, 217))}
    assert all(EXCLUDED.values())

def test_training_leaves_out_and_can_be_told_not_to(tmp_path):
    data = open_data(shanghaitech(tmp_path, numbers=(1, 2, 60)))
    assert [o.number for o in training_items(data)] == [1] and len(training_items(data, exclude=False)) == 3
    test = open_data(shanghaitech(tmp_path/'t', half='test_data', numbers=(1, 2, 60)))
    assert len(training_items(test)) == 3 and type(training_items(list(test))) is CrowdData

def test_a_generated_set_is_not_taken_for_the_real_one(tmp_path):
    data = open_data(shanghaitech(tmp_path, numbers=range(1, 16)))
    sides = {s: {o.number for o in split_of(data, s)} for s in ('train', 'tune', 'valid')}
    assert sum(map(len, sides.values())) == 15 == len(set.union(*sides.values())) and all(sides.values())
    listed = {s: {n for n in range(1, 16) if shipped_split('A')[f'IMG_{n}.jpg'][1] == s} for s in sides}
    assert sides != listed

def test_official_validation_half_is_kept(tmp_path):
    write_jhu(tmp_path)
    data = open_data(tmp_path)
    assert [o.number for o in split_of(data, 'valid')] == [2] and [o.number for o in split_of(data, 'test')] == [10]
    assert [o.number for o in split_of(data, 'train')] == [1] and split_of(data, 'all') is data

def test_sides_that_are_empty_are_refused(tmp_path):
    write_ucf_cc_50(tmp_path)
    refused(lambda: split_of(open_data(tmp_path), 'test'), 'pictures for test', 'none in 3 pictures')
    refused(lambda: split_of(open_data(tmp_path), 'validation'), 'validation', 'one of train')

# What is wrong with a data set

def test_check_of_a_clean_set(tmp_path): assert check(shanghaitech(tmp_path)) == []

def test_check_names_everything(tmp_path):
    root = shanghaitech(tmp_path, numbers=range(1, 10))
    images, truth = root/'part_A/train_data/images', root/'part_A/train_data/ground-truth'
    (images/'IMG_1.jpg').write_bytes((images/'IMG_1.jpg').read_bytes()[:600])
    (truth/'GT_IMG_2.mat').unlink()
    mat(truth/'GT_IMG_3.mat', other=1)
    shanghai(truth/'GT_IMG_4.mat', [[5, 5], [5, 5], [64, 10]])
    shanghai(truth/'GT_IMG_5.mat', np.zeros((0, 2)))
    shanghai(truth/'GT_IMG_6.mat', [[5, 5]], count=2)
    shanghai(truth/'GT_IMG_7.mat', [[np.nan, 5]])
    picture(images/'IMG_8.jpg', (20, 20))
    picture(root/'part_A/test_data/images/IMG_1.jpg', seed=9)
    shanghai(root/'part_A/test_data/ground-truth/GT_IMG_1.mat', [[5, 5]])
    seen, calls = check(open_data(root)), []
    found = {(p.file.name, p.kind) for p in seen}
    assert found == {('IMG_1.jpg', 'unreadable picture'), ('IMG_2.jpg', 'missing annotation'),
                     ('GT_IMG_3.mat', 'malformed annotation'),
                     ('IMG_4.jpg', 'duplicate points'), ('IMG_4.jpg', 'outside the frame'),
                     ('IMG_5.jpg', 'empty annotation'),
                     ('IMG_6.jpg', 'count field'), ('GT_IMG_7.mat', 'malformed annotation'),
                     ('IMG_8.jpg', 'unreadable picture'),
                     ('IMG_9.jpg', 'near-duplicate')}
    assert check(open_data(root), progress=lambda it, text: calls.append(text) or it) == seen and calls == ['checking']

# The real training halves

@pytest.mark.parametrize('part, n, heads', [('A', 300, 162_413), ('B', 400, 49_151)])
def test_real_halves(real_data, part, n, heads):
    data = open_data(real_data, part=part).select(split='train')
    assert len(data) == n and sum(o.count() for o in data) == heads and not data.strays
    sides = {o.name: s for s in ('train', 'tune', 'valid') for o in split_of(data, s)}
    assert sides == {o.name: shipped_split(part)[o.name][1] for o in data}
    assert len(split_of(data[:60], 'train')) == sum(shipped_split(part)[o.name][1] == 'train' for o in data[:60])
    assert len(training_items(data)) == n - sum(k[0] == part for k in EXCLUDED)
    assert {o.file.name for o in D._known_faults(data)} == {f'IMG_{k[2]}.jpg' for k in EXCLUDED if k[0] == part}

def crossing(data, groups):
    "Pictures of one group that the shipped list puts on different sides"
    sides, split = defaultdict(set), shipped_split(data[0].part)
    for o, g in zip(data, groups): sides[g].add(split[o.name][1])
    return [[o.name for o, h in zip(data, groups) if h == g] for g, s in sides.items() if len(s) > 1]

@pytest.mark.parametrize('part', 'AB')
def test_no_look_alike_pair_crosses(real_data, part):
    "Thumbnails of several sizes, and a light search for the same place"
    data = open_data(real_data, part=part).select(split='train')
    greys, split = [D._grey(o.image, 256) for o in data], shipped_split(part)
    for side in (12, 16, 24, 32):
        pairs = np.argwhere(np.triu(D._correlations(greys, side), 1) > .9)
        assert not [(i, j) for i, j in pairs if split[data[i].name][1] != split[data[j].name][1]]
    assert crossing(data, look_alikes([o.image for o in data], effort=((384, 200, 10),))) == []

@pytest.mark.slow
@pytest.mark.parametrize('part', 'AB')
def test_no_look_alike_pair_crosses_thorough(real_data, part):
    data = open_data(real_data, part=part).select(split='train')
    assert crossing(data, look_alikes([o.image for o in data], effort=D.THOROUGH)) == []
