"""What is asked, sent or configured wrongly, again and again, leaves nothing behind: memory of a process of its own while it is fuzzed.

Each round does the same amount of everything; the first rounds fill caches and pools, and after them memory stays. `--slow` runs many rounds."""
import io, json, os, random, signal, subprocess, sys, textwrap
from pathlib import Path

import numpy as np, pytest
from PIL import Image

from watching import dots, free_port, site_text, until, write_video

psutil = pytest.importorskip('psutil')
ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='resident memory is comparable on Linux alone')

def growth(mb, # resident memory after each round
           warm # rounds at the beginning that do not count
          )->float: # MB
    "How much higher memory lies in the last rounds than in those after the warm ones: medians of a third each"
    rest = mb[warm:]
    k = max(len(rest)//3, 1)
    return float(np.median(rest[-k:]) - np.median(rest[:k]))

def test_growth_is_seen_and_noise_is_not():
    r = random.Random(0)
    assert growth([100 + r.random() for _ in range(30)], 3) < 1
    assert growth([80, 90, 100] + [100 + i for i in range(30)], 3) > 15
    assert growth([50, 80, 90, 100, 100, 100], 3) == 0

def mangled(data, r, n=4):
    "`data` with a few bytes changed, put in or cut off"
    b = bytearray(data)
    for _ in range(r.randint(1, n)):
        i = r.randrange(len(b) + 1)
        how = r.randrange(4)
        if how == 0: b[i:i+1] = bytes([r.randrange(256)])
        elif how == 1: b[i:i] = r.randbytes(r.randint(1, 9))
        elif how == 2: del b[i:i + r.randint(1, 40)]
        elif r.random() < .3: del b[i:]
    return bytes(b)

def some_picture(r):
    "A picture file of any kind, now and then whole"
    h, w = r.randint(8, 300), r.randint(8, 300)
    f, kind = io.BytesIO(), r.choice(['JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF'])
    Image.fromarray(np.frombuffer(r.randbytes(h*w), np.uint8).reshape(h, w)).save(f, kind)
    return f.getvalue() if r.random() < .3 else mangled(f.getvalue(), r)

PATHS = ['/', '/login', '/health', '/ready', '/metrics', '/openapi.json', '/api/cameras', '/api/zones', '/api/readings', '/api/events', '/api/events/x/acknowledge',
         '/api/count', '/api/cameras/gate/picture.jpg', '/api/cameras/gate/density.png', '/logout', '/nothing']

def some_text(r): return ''.join(r.choice(['a', '0', '-', '%00', 'é', '../', "'", '"', '\\', '{', ' ', '9'*30, '1970-01-01', '\u202e']) for _ in range(r.randint(0, 8)))

def ask(web, r):
    "One request that may be anything"
    path, how = r.choice(PATHS), r.random()
    if how < .25: path += '/' + some_text(r).replace('\u202e', '')
    params = {r.choice(['zone', 'since', 'limit', 'camera', some_text(r) or 'x']): some_text(r) for _ in range(r.randint(0, 3))}
    headers = {'content-type': r.choice(['application/json', 'multipart/form-data', 'multipart/form-data; boundary=x', 'image/jpeg', 'text/plain'])} if r.random() < .5 else {}
    if r.random() < .2: headers['x-' + 'y'*r.randint(1, 30)] = 'z'*r.randint(0, 3000)
    body = r.choice([b'', b'{', b'--x\r\n', b'null', r.randbytes(r.randint(0, 3000))])
    url = str(web.base_url).rstrip('/') + path # a path alone that begins with two slashes would be taken for another host
    return web.request(r.choice(['GET', 'GET', 'POST', 'PUT', 'DELETE', 'OPTIONS', 'HEAD']), url, params=params, headers=headers, content=body)

def answered(asked):
    "The answer, or None where the server closed the connection on a body that it did not want"
    import httpx
    try: return asked()
    except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError): return None

def fuzzed_server(tmp_path, rounds, requests, pictures, warm):
    "Memory of a serving process after each round of requests and pictures, and the statuses it gave"
    httpx = pytest.importorskip('httpx')
    write_video(tmp_path/'v.avi', (dots(6, i) for i in range(40)), 10)
    (tmp_path/'site.toml').write_text(site_text({'gate': 'v.avi'}))
    port, r, seen, mb, cut = free_port(), random.Random(0), {}, [], 0
    code = (f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from watching import Dots; from crowd_density.serve import serve; '
            f'sys.exit(serve("site.toml", port={port}, model=Dots(), loop=True, history="h.db"))')
    with open(tmp_path/'err.txt', 'w') as err:
        p = subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=err, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    try:
        with httpx.Client(base_url=f'http://127.0.0.1:{port}', timeout=30) as web:
            def ready():
                try: return web.get('/ready').status_code == 200
                except httpx.HTTPError: return False
            until(ready, 40)
            for _ in range(rounds):
                answers = [answered(lambda: ask(web, r)) for _ in range(requests)]
                answers += [answered(lambda: web.post('/api/count', content=some_picture(r))) for _ in range(pictures)]
                cut += answers.count(None)
                for a in filter(None, answers):
                    seen[a.status_code] = seen.get(a.status_code, 0) + 1
                    assert a.status_code < 500 and 'Traceback' not in a.text, (a.request.method, a.request.url, a.text[:500])
                mb.append(psutil.Process(p.pid).memory_info().rss/1e6)
    finally:
        p.send_signal(signal.SIGTERM)
        try: p.wait(15)
        except subprocess.TimeoutExpired: p.kill()
    assert 'Traceback' not in (tmp_path/'err.txt').read_text()
    assert cut <= .03*sum(seen.values()), (cut, seen)
    print(f'\n{rounds} rounds, statuses {dict(sorted(seen.items()))}, {cut} cut off; MB {mb[0]:.1f}, {mb[warm]:.1f} … {mb[-1]:.1f}, growth {growth(mb, warm):+.2f}')
    return growth(mb, warm)/mb[warm], seen

@linux
def test_a_fuzzed_server_does_not_grow(tmp_path):
    grown, seen = fuzzed_server(tmp_path, 12, 40, 12, warm=6)
    assert grown <= .02 and {200, 404, 422} <= set(seen), (grown, seen)

@linux
@pytest.mark.slow
def test_a_server_fuzzed_for_long_does_not_grow(tmp_path):
    grown, seen = fuzzed_server(tmp_path, 90, 100, 40, warm=15)
    assert grown <= .02, (grown, seen)

def rounds_of(code, rounds, **names):
    "Memory of a new Python after each round of `step(r)`, which `code` defines"
    code = f'''
import gc, json, random, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
{textwrap.dedent(code)}
r, mb = random.Random(0), []
for _ in range({rounds}):
    step(r)
    gc.collect()
    mb.append(int(open('/proc/self/statm').read().split()[1])*4096/1e6)
print(json.dumps(mb))'''
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **names})
    assert p.returncode == 0, p.stderr[-2000:]
    mb = json.loads(p.stdout.splitlines()[-1])
    return mb

def check_rounds(mb, warm, most=.02):
    grown = growth(mb, warm)
    print(f'\n{len(mb)} rounds: MB {mb[0]:.1f}, {mb[warm]:.1f} … {mb[-1]:.1f}, growth {grown:+.2f}')
    assert grown <= most*mb[warm], mb

SITES = '''
    from test_growth import mangled
    from crowd_density.ground import SiteError, parse_site
    from watching import site_text
    text = site_text({'gate': 'rtsp://x/1', 'stairs': 'rtsp://x/2'}).encode()
    def step(r):
        good = bad = 0
        for _ in range(60):
            try: parse_site(mangled(text, r, 2).decode('utf-8', 'replace'))
            except SiteError: bad += 1
            else: good += 1
        assert good and bad'''

@linux
def test_fuzzed_site_files_do_not_grow(): check_rounds(rounds_of(SITES, 12), 4)

@linux
@pytest.mark.slow
def test_site_files_fuzzed_for_long_do_not_grow(): check_rounds(rounds_of(SITES, 120), 15)

PICTURES = '''
    import numpy as np
    from test_growth import mangled, some_picture
    from crowd_density.inference import load
    from crowd_density.watch import SourceError, decode_rgb
    model = load({model!r}, threads=1)
    def step(r):
        for _ in range(6):
            try: rgb = decode_rgb(some_picture(r))
            except SourceError: continue
            model.predict(rgb)
        for _ in range(2): model.predict(np.frombuffer(r.randbytes(3*(h := r.randint(32, 400))*(w := r.randint(32, 400))), np.uint8).reshape(h, w, 3))'''

@pytest.fixture(scope='module', params=['counting', 'segmentation'])
def shipped(request):
    from crowd_density.inference import ModelError, model_path
    try: model_path(request.param)
    except ModelError as e: pytest.skip(str(e))
    return request.param

@linux
def test_pictures_of_all_sizes_do_not_grow(tmp_path):
    import tiny
    check_rounds(rounds_of(PICTURES.format(model=str(tiny.counting(tmp_path/'m.onnx'))), 14), 5)

@linux
@pytest.mark.slow
def test_pictures_of_all_sizes_do_not_grow_with_shipped_weights(shipped): check_rounds(rounds_of(PICTURES.format(model=shipped), 60), 15)
