"The command line: every verb's ending, and input of every kind"
import json, pickle, resource, subprocess, sys
from pathlib import Path

import numpy as np, pytest, tiny
from PIL import Image
from scipy.io import savemat
from typer.testing import CliRunner

from crowd_density import cli, synthetic
from crowd_density.data import DataError

VERBS = 'demo synth check prepare pack fine-tune evaluate predict calibrate watch serve export'.split()
runner = CliRunner()

def run(*args): return runner.invoke(cli.app, [str(a) for a in args], prog_name='crowd-density')

def shell(*args, code='from crowd_density.cli import main; main()', **kw):
    return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, **kw)

def lines(path): return [json.loads(o) for o in Path(path).read_text(encoding='utf-8').splitlines()]

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    d = tmp_path_factory.mktemp('models')
    return dict(counting=tiny.counting(d/'counting.onnx'), segmentation=tiny.segmentation(d/'segmentation.onnx'))

@pytest.fixture(scope='module')
def street(tmp_path_factory):
    "A generated data set of six pictures, two of them held for tests"
    out = tmp_path_factory.mktemp('street')/'a street'
    synthetic.write_dataset(out, images=6, seed=1, size_hw=(192, 256), test=1/3)
    return out

@pytest.fixture
def photo(tmp_path):
    def make(name='a.png', size_hw=(64, 96), mode='RGB', **kw):
        rng = np.random.default_rng(0)
        im = Image.fromarray(rng.integers(0, 255, (*size_hw, 3), np.uint8)).convert(mode)
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        im.save(tmp_path/name, **kw)
        return tmp_path/name
    return make

# --- help, version, usage

def test_help_and_version():
    got = run('--help')
    assert got.exit_code == 0
    for v in VERBS + ['train']: assert f' {v} ' in got.output
    assert run('--version').output.startswith('crowd-density ')
    assert run().exit_code in (0, 2)

@pytest.mark.parametrize('verb', VERBS + ['train autoencoder', 'train segmentation', 'train counting'])
def test_each_verb_explains_itself(verb):
    got = run(*verb.split(), '--help')
    assert got.exit_code == 0 and 'Usage: crowd-density' in got.output

def test_predict_help_names_the_weights_licence(): assert 'LICENSE-WEIGHTS' in run('predict', '--help').output

@pytest.mark.parametrize('args', [['nonsense'], ['predict'], ['synth', 'x', '--images', 'many'], ['synth', 'x', '--images', '0'], ['prepare', 'x']])
def test_wrong_usage_is_2(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*args).exit_code == 2
    assert not list(tmp_path.iterdir())

def test_errors_of_the_users_are_a_line():
    got = shell('check', 'no such folder')
    assert got.returncode == 2 and got.stdout == ''
    assert got.stderr.count('\n') == 1 and 'no such folder: expected a folder' in got.stderr

def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    def bug(*a, **k): raise KeyError('a bug')
    monkeypatch.setattr(synthetic, 'write_dataset', bug)
    assert isinstance(run('synth', tmp_path/'x').exception, KeyError)

def test_opencv_without_its_system_libraries(tmp_path, photo):
    code = '''import sys
class NoGL:
    def find_spec(self, name, path=None, target=None):
        if name == 'cv2': raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory', name='cv2')
sys.meta_path.insert(0, NoGL())
from crowd_density.cli import main; main()'''
    got = shell('predict', photo(), code=code)
    assert got.returncode == 2 and 'Traceback' not in got.stderr
    assert 'libgl1' in got.stderr and 'opencv-python-headless' in got.stderr

# --- synth, check, prepare

def test_synth_is_repeatable(tmp_path):
    for d in 'ab': assert run('synth', tmp_path/d, '--images', 3, '--seed', 5).exit_code == 0
    files = lambda d: {p.relative_to(d): p.read_bytes() for p in sorted(d.rglob('*')) if p.is_file() and p.suffix != '.mat'}
    assert files(tmp_path/'a') == files(tmp_path/'b') and len(files(tmp_path/'a')) >= 3

def test_synth_clip(tmp_path):
    assert run('synth', tmp_path/'c', '--clip', '--seconds', 4, '--peak', 2).exit_code == 0
    assert {'clip.mp4', 'truth.csv', 'site.toml'} <= {p.name for p in (tmp_path/'c').iterdir()}
    assert (tmp_path/'c'/'truth.csv').read_text().splitlines()[0] == 'time,zone,people,density'

def test_check(street, tmp_path):
    got = run('check', street, '--json', tmp_path/'c.json')
    found = json.loads((tmp_path/'c.json').read_text())
    assert found['n'] == 6 and got.exit_code == int(bool(found['problems']))

def spoil(street, tmp_path):
    import shutil
    d = tmp_path/'spoilt'
    shutil.copytree(street, d)
    half = d/'part_A'/'train_data'
    images, truth = sorted((half/'images').iterdir()), half/next(p.name for p in half.iterdir() if 'truth' in p.name)
    images[0].write_bytes(images[0].read_bytes()[:2000])
    savemat(truth/f'GT_{images[1].stem}.mat', {'other': np.zeros(3)})
    return d, images

def test_check_names_what_is_wrong(street, tmp_path):
    d, images = spoil(street, tmp_path)
    got = run('check', d, '--json', tmp_path/'c.json')
    assert got.exit_code == 1
    named = {Path(o['file']).name for o in json.loads((tmp_path/'c.json').read_text())['problems']}
    assert images[0].name in named and any(images[1].stem in o for o in named)

def test_prepare(street, tmp_path):
    got = run('prepare', street, tmp_path/'p', '--size', 64)
    assert got.exit_code == 0, got.output
    assert {'images', 'heatmap', 'mask', 'pairs.csv'} <= {p.name for p in (tmp_path/'p').iterdir()}

def test_prepare_does_the_rest(street, tmp_path):
    d, images = spoil(street, tmp_path)
    got = run('prepare', d, tmp_path/'p', '--size', 64)
    assert got.exit_code == 1
    assert images[0].name in got.stderr and images[1].stem in got.stderr
    assert sum(p.is_file() for p in (tmp_path/'p'/'images').rglob('*')) == 4

@pytest.mark.parametrize('verb', [['check'], ['prepare', 'OUT'], ['evaluate'], ['train', 'segmentation', '--out', 'OUT'], ['train', 'autoencoder', '--out', 'OUT']])
@pytest.mark.parametrize('kind', ['missing', 'empty', 'a file'])
def test_unusable_data_is_2(verb, kind, tmp_path, models):
    d = tmp_path/'data'
    if kind == 'empty': d.mkdir()
    if kind == 'a file': d.write_text('x')
    where = {'evaluate': ['evaluate', models['counting'], d]}.get(verb[0]) or [*verb[:2 if verb[0] == 'train' else 1], d, *verb[2 if verb[0] == 'train' else 1:]]
    got = run(*[str(a).replace('OUT', str(tmp_path/'out')) for a in where])
    assert got.exit_code == 2 and str(d) in got.stderr
    assert not list(tmp_path.glob('out/*'))

# --- predict

KINDS = dict(rgb=dict(), grey=dict(mode='L'), palette=dict(mode='P'), rgba=dict(mode='RGBA'), cmyk=dict(name='c.jpg', mode='CMYK'), bit=dict(mode='1'),
    webp=dict(name='c.webp'), bmp=dict(name='c.bmp'), tiff=dict(name='c.tif'), spaces=dict(name='two words.png'), unicode=dict(name='群衆 – ü.png'),
    smallest=dict(size_hw=(32, 32)), odd=dict(size_hw=(33, 127)))

@pytest.mark.parametrize('kind', KINDS)
def test_predict_reads(kind, photo, models, tmp_path):
    p = photo(**KINDS[kind])
    got = run('predict', p, '--model', models['counting'], '--json', tmp_path/'o.jsonl')
    assert got.exit_code == 0, got.output
    o, = lines(tmp_path/'o.jsonl')
    assert list(o) == ['file', 'count', 'low', 'high', 'share', 'seconds', 'error']
    assert o['file'] == str(p) and o['error'] is None and o['count'] >= 0 and str(p) in got.stdout

def test_bits_and_provider_are_those_asked_for_or_refused(photo, tmp_path):
    from crowd_density.inference import quantise
    p, m = photo(), tiny.counting(tmp_path/'m.onnx')
    ask = lambda *more: run('predict', p, '--model', m, '--json', tmp_path/'o.jsonl', *more)
    assert ask('--bits', 32, '--provider', 'cpu').exit_code == 0
    for more, word in ((('--bits', 8), 'quantise'), (('--bits', 16), 'expected 8 or 32'), (('--provider', 'abacus'), 'abacus')):
        got = ask(*more)
        assert got.exit_code == 2 and word in got.output, got.output
    quantise(m, [np.full((96, 128, 3), k, np.uint8) for k in (20, 200)])
    assert ask('--bits', 8).exit_code == 0 and lines(tmp_path/'o.jsonl')[0]['count'] >= 0

def test_predict_16_bit(tmp_path, models):
    Image.fromarray((np.arange(64*64).reshape(64, 64)*16).astype(np.uint16)).save(tmp_path/'deep.png')
    assert run('predict', tmp_path/'deep.png', '--model', models['counting']).exit_code == 0

def test_predict_keeps_the_stored_orientation(photo, models, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    p = photo('turned.jpg', size_hw=(64, 96), exif=exif)
    assert run('predict', p, '--model', models['segmentation'], '--mask', tmp_path/'m').exit_code == 0
    assert Image.open(tmp_path/'m'/'turned.png').size == (96, 64)

def test_predict_48_megapixels(tmp_path, models):
    Image.fromarray(np.full((6000, 8000), 130, np.uint8)).save(tmp_path/'big.png')
    got = run('predict', tmp_path/'big.png', '--model', models['counting'])
    assert got.exit_code == 0, got.output

BAD = dict(text=b'not a picture', empty=b'', cut=None, small=None, missing=None)

@pytest.mark.parametrize('kind', BAD)
def test_predict_names_a_bad_picture_and_does_the_rest(kind, photo, models, tmp_path):
    good, bad = photo('good.png'), tmp_path/'bad.jpg'
    if kind == 'cut': bad.write_bytes(photo('whole.jpg', size_hw=(300, 300)).read_bytes()[:2000])
    elif kind == 'small': photo('bad.jpg', size_hw=(31, 400))
    elif kind != 'missing': bad.write_bytes(BAD[kind])
    got = run('predict', bad, good, '--model', models['counting'], '--json', tmp_path/'o.jsonl')
    assert got.exit_code == 1 and 'Traceback' not in got.output
    first, second = lines(tmp_path/'o.jsonl')
    assert first['file'] == str(bad) and 'bad.jpg' in first['error'] and 'expected' in first['error'] and first['count'] is None
    assert second['error'] is None and 'bad.jpg' in got.stderr

def test_predict_folders_and_patterns_in_order(photo, models, tmp_path):
    names = ['b/2.png', 'b/1.png', 'a.png']
    for n in names: photo(n)
    (tmp_path/'b'/'notes.txt').write_text('x')
    (tmp_path/'none').mkdir()
    got = run('predict', tmp_path/'b', tmp_path/'none', tmp_path/'?.png', tmp_path/'*.gif', '--model', models['counting'], '--json', tmp_path/'o.jsonl')
    assert got.exit_code == 1
    assert [Path(o['file']).name for o in lines(tmp_path/'o.jsonl')] == ['1.png', '2.png', 'none', 'a.png', '*.gif']
    assert [o['error'] is None for o in lines(tmp_path/'o.jsonl')] == [True, True, False, True, False]

def test_predict_writes_what_was_asked_for(photo, models, tmp_path):
    p = photo('square one.png')
    dirs = [o for k in ('overlay', 'map', 'mask') for o in (f'--{k}', tmp_path/k)]
    assert run('predict', p, '--model', models['counting'], *dirs, '--json', tmp_path/'o.jsonl').exit_code == 0
    o, = lines(tmp_path/'o.jsonl')
    assert np.load(tmp_path/'map'/'square one.npy').sum() == pytest.approx(o['count'], rel=1e-4)
    assert Image.open(tmp_path/'overlay'/'square one.jpg').size == (96, 64)
    mask = np.asarray(Image.open(tmp_path/'mask'/'square one.png'))
    assert mask.shape == (64, 96) and set(np.unique(mask)) <= {0, 255}

def test_predict_with_a_segmentation_model(photo, models, tmp_path):
    got = run('predict', photo(), '--model', models['segmentation'], '--json', tmp_path/'o.jsonl')
    o, = lines(tmp_path/'o.jsonl')
    assert got.exit_code == 0 and o['count'] is None and o['low'] is None and 0 <= o['share'] <= 1

def test_predict_map_of_a_segmentation_model_is_refused(photo, models, tmp_path):
    got = run('predict', photo(), '--model', models['segmentation'], '--map', tmp_path/'m')
    assert got.exit_code == 2 and 'density map' in got.stderr

def test_predict_loses_neither_of_two_pictures_of_one_name(photo, models, tmp_path):
    pictures = photo('x/a.png'), photo('y/a.png'), photo('y/a.jpg')
    assert run('predict', *pictures, '--model', models['counting'], '--mask', tmp_path/'m').exit_code == 0
    assert len(list((tmp_path/'m').iterdir())) == 3

def test_predict_to_standard_output(photo, models):
    got = shell('predict', photo(), '--model', models['counting'], '--json', '-')
    assert got.returncode == 0 and json.loads(got.stdout)['error'] is None

@pytest.mark.parametrize('kind', ['pickle', 'cut', 'text', 'foreign', 'missing', 'folder'])
def test_predict_refuses_foreign_weights(kind, photo, models, tmp_path):
    p = tmp_path/'weights.onnx'
    if kind == 'pickle': p.write_bytes(pickle.dumps(dict(a=np.zeros(99))))
    if kind == 'cut': p.write_bytes(models['counting'].read_bytes()[:200])
    if kind == 'text': p.write_text('weights '*99)
    if kind == 'foreign': tiny.counting(p, task='classification')
    if kind == 'folder': p.mkdir()
    got = run('predict', photo(), '--model', p)
    assert got.exit_code == 2 and got.stdout == '' and 'expected' in got.stderr

# --- outputs that cannot be written

def test_output_below_a_file(photo, models, tmp_path):
    (tmp_path/'file').write_text('x')
    for args in (['--overlay', tmp_path/'file'/'o'], ['--json', tmp_path/'file'/'o.jsonl']):
        got = run('predict', photo(), '--model', models['counting'], *args)
        assert got.exit_code == 2 and 'file' in got.stderr and 'Traceback' not in got.stderr

def test_full_disk_loses_nothing(photo, models, tmp_path):
    "The same error as of a full disk, by a limit on the size of a file"
    old = tmp_path/'o.jsonl'
    old.write_text('what was there')
    got = shell('predict', *[photo('a.png')]*40, '--model', models['counting'], '--json', old,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    assert got.returncode == 2 and 'Traceback' not in got.stderr
    assert old.read_text() == 'what was there' and not list(tmp_path.glob('.*'))

# --- evaluate, export

def test_fine_tune_says_what_it_brought_and_what_it_cost(street, tmp_path, monkeypatch):
    from crowd_density import counting
    def judged(mae, n, kind): return {kind: dict(mae=mae, n=n)}
    figures = dict(share=.75, gain=1., before=judged(9., 4, 'own'), after=judged(1.4, 4, 'own'),
                   kept=dict(before=judged(9.8, 16, 'scene'), after=judged(10.6, 16, 'scene')))
    def stand_in(weights, data, out, epochs=20): return dict(figures=figures)
    monkeypatch.setattr(counting, 'fine_tune', stand_in)
    got = run('fine-tune', 'counting', street, '--out', tmp_path/'mine')
    assert got.exit_code == 0, got.output
    for o in ('75% of the new weights', 'own: 9.0 → 1.4 on 4 pictures', 'not learned from, scene: 9.8 → 10.6 on 16 pictures'): assert o in got.output

@pytest.mark.parametrize('task', ['counting', 'segmentation'])
def test_evaluate(task, street, models, tmp_path):
    got = run('evaluate', models[task], street, '--split', 'all', '--json', tmp_path/'e.json', '--figures', tmp_path/'f')
    assert got.exit_code == 0, got.output
    r = json.loads((tmp_path/'e.json').read_text())
    assert r['n'] == 6 and len(r['per_image']) == 6
    assert ('mae' in r) == (task == 'counting') and {'precision', 'recall', 'f1', 'support'} == set(r['pixel']['human'])
    assert {'scatter.png', 'report.html'} <= {p.name for p in (tmp_path/'f').iterdir()}

def test_evaluate_every(street, models, tmp_path):
    assert run('evaluate', models['counting'], street, '--split', 'all', '--every', 4, '--json', tmp_path/'e.json').exit_code == 0
    assert json.loads((tmp_path/'e.json').read_text())['n'] == 2

def test_evaluate_goes_on_past_bad_pictures(street, models, tmp_path):
    d, images = spoil(street, tmp_path)
    got = run('evaluate', models['counting'], d, '--split', 'all', '--json', tmp_path/'e.json')
    assert got.exit_code == 1 and images[0].name in got.stderr
    assert json.loads((tmp_path/'e.json').read_text())['n'] == 4

def test_evaluate_says_when_pictures_are_missing(street, models):
    assert 'officially' in run('evaluate', models['counting'], street, '--split', 'test').stderr

def test_evaluate_unknown_split_is_2(street, models): assert run('evaluate', models['counting'], street, '--split', 'best').exit_code == 2

def test_export(models, tmp_path):
    assert run('export', models['counting'], tmp_path/'m.onnx').exit_code == 0
    assert (tmp_path/'m.onnx').read_bytes() == models['counting'].read_bytes()
    assert run('export', models['counting'], tmp_path/'m.pth').exit_code == 2

# --- without torch

BLOCK = '''import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'torchvision', 'fastai', 'timm', 'safetensors', 'onnx', 'onnxscript'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Blocked())
from crowd_density.cli import main; main()'''

def test_predict_without_torch(photo, models):
    got = shell('predict', photo(), '--model', models['counting'], code=BLOCK)
    assert got.returncode == 0, got.stderr

def test_evaluate_without_torch(street, models):
    got = shell('evaluate', models['segmentation'], street, '--split', 'test', code=BLOCK)
    assert got.returncode == 0, got.stderr

def test_watch_without_torch(models, tmp_path):
    assert run('synth', tmp_path/'c', '--clip', '--seconds', 4, '--peak', 2).exit_code == 0
    got = shell('watch', tmp_path/'c'/'site.toml', '--model', models['counting'], '--json', tmp_path/'e.jsonl', code=BLOCK)
    assert got.returncode == 0, got.stderr
    assert any(o['kind'] == 'reading' for o in lines(tmp_path/'e.jsonl'))

def test_train_without_torch_says_so(street, tmp_path):
    got = shell('train', 'segmentation', street, '--out', tmp_path/'r', code=BLOCK)
    assert got.returncode == 2 and 'not installed' in got.stderr and 'Traceback' not in got.stderr

def test_site_errors_are_2(tmp_path):
    (tmp_path/'s.toml').write_text('[[camera]]\nname = ')
    for verb in ('watch', 'serve'):
        got = run(verb, tmp_path/'s.toml')
        assert got.exit_code == 2 and 's.toml' in got.stderr
    assert run('watch', tmp_path/'none.toml').exit_code == 2

def test_explain():
    assert cli.explain(DataError('a', 'b', 'c')) == 'a: expected b, found c'
    assert cli.explain(OSError(28, 'No space left on device', 'out/x')) == 'out/x: No space left on device'
    assert cli.explain(ZeroDivisionError()) == ''
