"The interface, who may use it, and the page in a real browser"
import asyncio, itertools, json, os, re, signal, socket, struct, subprocess, sys, threading, time, zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np, pytest
from fastapi.testclient import TestClient

from crowd_density import serve
from crowd_density.serve import Access, Broker, ServeError, create_app, heat_rgba, is_local, page
from crowd_density.watch import History, Watcher, encode_jpeg
from watching import Dots, Hand, browser, dots, free_port, make_site, site_text, until, write_video

@pytest.fixture(autouse=True)
def quiet(caplog): caplog.set_level('CRITICAL', 'crowd_density.watch')

TOKEN, PASSWORD = 'a-token-of-the-tests', 'correct horse'

class Stage:
    "A site whose cameras show as many dots as one says"
    def __init__(self, cameras=('gate',), history=None, **kwargs):
        os.environ['STAGE_PW'] = 'tell-nobody'
        self.n, self.lost = dict.fromkeys(cameras, 3), set()
        self.site = make_site({c: f'rtsp://guard:${{STAGE_PW}}@{i}.example/1' for i, c in enumerate(cameras)}, rate=10, stale_after=1., for_=.2, hold=.3)
        sources = {c.name: Hand(c, lambda i, n=c.name: None if n in self.lost else dots(self.n[n], i), 20) for c in self.site.cameras}
        self.watcher = Watcher(self.site, Dots(), history, realtime=True, sources=sources, risk=dict(cooldown=.5, source_cooldown=.1))
        self.app = create_app(watcher=self.watcher, hosts=['testserver'], **kwargs)
    def level(self, camera='gate'): return self.watcher.cameras[camera].zones['square'].level

@pytest.fixture
def web():
    s = Stage()
    with TestClient(s.app) as c:
        until(lambda: s.level() == 'clear')
        c.stage = s
        yield c

@pytest.fixture
def locked():
    s = Stage(token=TOKEN, password=PASSWORD)
    with TestClient(s.app, follow_redirects=False) as c: yield c

# ---- what it says

def test_addresses(web):
    camera, = web.get('/api/cameras').json()
    assert camera['name'] == 'gate' and camera['good'] and camera['size'] == [160, 120] and camera['zones'] == ['square']
    zone, = web.get('/api/zones').json()
    assert zone['level'] == 'clear' and zone['density'] == pytest.approx(.25, abs=.1) and zone['low'] <= zone['density'] <= zone['high']
    assert np.allclose(zone['polygon'], [[0, 0], [1, 0], [1, 1], [0, 1]], atol=1e-6) and 0 <= zone['age'] < 2
    readings = web.get('/api/readings', params=dict(zone='square', since=time.time() - 60)).json()
    assert readings and {r['kind'] for r in readings} == {'reading'} and readings == sorted(readings, key=lambda r: r['time'])
    assert web.get('/api/readings', params=dict(zone='gate/square', since='2999-01-01T00:00:00Z')).json() == []
    assert web.get('/api/events', params=dict(since='1970-01-01T00:00:00+00:00')).json()[-1]['kind'] == 'source'
    assert web.get('/health').json()['status'] == 'ok' and web.get('/ready').json()['status'] == 'ready'
    assert 'crowd_density_level{camera="gate",level="clear",zone="square"} 1.0' in web.get('/metrics').text
    assert web.get('/api/cameras/gate/picture.jpg').content[:2] == b'\xff\xd8' and web.get('/api/cameras/gate/density.png').content[1:4] == b'PNG'

def test_openapi_describes_it(web):
    paths = web.get('/openapi.json').json()['paths']
    assert set(paths) >= {'/api/cameras', '/api/zones', '/api/readings', '/api/events', '/api/events/{id}/acknowledge', '/api/count', '/api/stream', '/health', '/ready', '/metrics'}
    assert web.get('/docs').status_code == 404 # its page loads from another host

@pytest.mark.parametrize('path, status', [('/api/readings?zone=nowhere', 404), ('/api/events?zone=nowhere', 404), ('/api/readings?since=yesterday', 422), ('/api/readings?since=nan', 422),
    ('/api/readings?limit=0', 422), ('/api/readings?every=-1', 422), ('/api/cameras/none/picture.jpg', 404), ('/api/cameras/none/density.png', 404), ('/nothing', 404)])
def test_wrong_questions(web, path, status):
    r = web.get(path)
    assert r.status_code == status and 'Traceback' not in r.text and r.json()['detail']

def test_events_are_acknowledged_once(web):
    web.stage.n['gate'] = 60
    until(lambda: web.stage.level() == 'critical')
    e = web.get('/api/events').json()[0]
    assert e['acknowledged'] is None
    seen = web.post(f'/api/events/{e["id"]}/acknowledge', json=dict(by='ann')).json()
    assert seen['acknowledged_by'] == 'ann' and seen['acknowledged']
    assert web.post(f'/api/events/{e["id"]}/acknowledge').json() == seen
    assert web.post('/api/events/none/acknowledge').status_code == 404
    assert web.post(f'/api/events/{e["id"]}/acknowledge', json=dict(by='x'*101)).status_code == 422

def test_a_lost_camera_is_unknown_and_still_healthy(web):
    web.stage.lost.add('gate')
    until(lambda: web.stage.level() == 'unknown')
    zone, camera = web.get('/api/zones').json()[0], web.get('/api/cameras').json()[0]
    assert zone['density'] is None and zone['count'] is None and 'pulled cable' in zone['reason'] and not camera['good']
    assert web.get('/health').status_code == 200 and web.get('/ready').json()['good'] == 0
    assert re.search(r'crowd_density_density\{camera="gate",zone="square"\} NaN', web.get('/metrics').text)

def test_pictures_are_pixelated(web):
    from PIL import Image
    import io
    im = Image.open(io.BytesIO(web.get('/api/cameras/gate/picture.jpg').content))
    assert im.size == (64, 48)

def test_no_secret_in_any_answer(web):
    for p in ('/api/cameras', '/api/zones', '/api/events', '/api/readings', '/metrics', '/openapi.json', '/health', '/ready', '/'): assert 'tell-nobody' not in web.get(p).text

def test_heat_means_the_same_everywhere():
    from crowd_density.inference import Estimate
    ground = make_site({'a': 'x'}).cameras[0].ground
    e = Estimate(density=np.full((15, 20), 4*12/300, np.float32), cell=8, size_hw=(120, 160)) # 4 people per m²
    assert abs(int(heat_rgba(e, ground)[7, 10, 0]) - 187) < 12 # the middle of the colours

# ---- pushed

def test_stream_tells_readings_events_and_acknowledgements():
    with server(Stage(('gate',))) as (base, stage, _):
        import httpx
        heard = []
        def listen(headers={}):
            with httpx.stream('GET', base + 'api/stream', timeout=10, headers=headers) as r:
                kind = None
                for line in r.iter_lines():
                    if line.startswith('event: '): kind = line[7:]
                    if line.startswith('data: '): heard.append((kind, json.loads(line[6:])))
                    if len([1 for k, _ in heard if k == 'acknowledged']): return
        t = threading.Thread(target=listen, daemon=True)
        t.start()
        until(lambda: [1 for k, _ in heard if k == 'reading'])
        stage.n['gate'] = 60
        until(lambda: [1 for k, e in heard if k == 'event' and e['level'] == 'critical'])
        e = [e for k, e in heard if k == 'event' and e['level'] == 'critical'][0]
        httpx.post(base + f'api/events/{e["id"]}/acknowledge')
        t.join(5)
        assert heard[0][0] == 'ping' and heard[-1][1]['id'] == e['id']
        first = httpx.get(base + 'api/events').json()[-1]['id'] # who was away gets what was missed
        with httpx.stream('GET', base + 'api/stream', headers={'last-event-id': first}, timeout=10) as r:
            lines = r.iter_lines()
            ids = [next(l for l in lines if l.startswith('id: '))[4:] for _ in range(2)]
        assert ids == [x['id'] for x in reversed(httpx.get(base + 'api/events').json())][1:3]

def test_slow_pages_are_cut_off():
    async def go():
        b, n = Broker(length=3), 0
        b.loop = asyncio.get_running_loop()
        async for text in serve.stream(b):
            n += 1
            if n == 1:
                for i in range(10): b.put('reading', dict(id=i))
        return n, len(b.queues)
    n, left = asyncio.run(go())
    assert n <= 4 and left == 0

# ---- who may

def test_refuses_other_addresses_without_a_password(tmp_path):
    for host in ('0.0.0.0', '192.168.1.7', '::', 'example.org'):
        with pytest.raises(ServeError, match='token or password'): serve.serve(tmp_path/'site.toml', host=host)
    assert is_local('127.0.0.9') and is_local('::1') and is_local('localhost') and not is_local('127.0.0.1.evil.example')
    with pytest.raises(ServeError, match='16'): Access(token='short')
    with pytest.raises(ServeError, match='8'): Access(password='short')

def test_port_in_use_is_named(tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as s:
        with pytest.raises(ServeError, match='listen'): serve.serve(tmp_path/'site.toml', port=s.getsockname()[1])

PATHS = ['/', '/api/cameras', '/api/zones', '/api/readings', '/api/events', '/api/stream', '/api/session', '/metrics', '/openapi.json', '/api/cameras/gate/picture.jpg']

@pytest.mark.parametrize('path', PATHS)
def test_locked(locked, path):
    assert locked.get(path).status_code == 401 and locked.get(path, headers={'authorization': 'Bearer wrong'}).status_code == 401
    assert locked.get(path, headers={'accept': 'text/html'}).headers['location'] == '/login'
    if path != '/api/stream': assert locked.get(path, headers={'authorization': f'Bearer {TOKEN}'}).status_code in (200, 404)

def test_health_is_open(locked): assert [locked.get(p).status_code for p in ('/health', '/ready', '/login')] == [200, 200, 200]

def test_login_session_csrf_logout(locked):
    assert locked.post('/login', data=dict(password='wrong')).status_code == 401
    r = locked.post('/login', data=dict(password=PASSWORD))
    cookie = r.headers['set-cookie'].lower()
    assert r.status_code == 303 and 'httponly' in cookie and 'samesite=strict' in cookie and PASSWORD not in cookie
    assert locked.get('/').status_code == 200
    csrf = locked.get('/api/session').json()['csrf']
    url = '/api/events/x/acknowledge'
    assert locked.post(url).status_code == 403 and locked.post(url, headers={'x-csrf-token': 'wrong'}).status_code == 403
    assert locked.post(url, headers={'x-csrf-token': csrf}).status_code == 404
    assert locked.post(url, headers={'x-csrf-token': csrf, 'origin': 'https://evil.example'}).status_code == 403
    assert locked.post(url, headers={'x-csrf-token': csrf, 'sec-fetch-site': 'cross-site'}).status_code == 403
    assert locked.post('/logout', headers={'x-csrf-token': csrf}).status_code == 303
    locked.cookies.clear()
    assert locked.get('/').status_code == 401

def test_login_is_limited(locked):
    got = [locked.post('/login', data=dict(password='wrong')) for _ in range(8)]
    assert [r.status_code for r in got] == [401]*5 + [429]*3 and int(got[-1].headers['retry-after']) > 0
    assert locked.post('/login', data=dict(password=PASSWORD)).status_code == 429

def test_no_password_in_memory_but_its_hash():
    a = Access(password=PASSWORD)
    assert PASSWORD not in repr(vars(a)) and a.knows(PASSWORD) and Access(password=a.hash).knows(PASSWORD)

def test_another_name_for_this_machine_is_refused(web): # DNS rebinding
    assert web.get('/api/zones', headers={'host': 'evil.example'}).status_code == 421
    assert web.get('/api/zones', headers={'host': '127.0.0.1:8000'}).status_code == 200
    assert web.get('/api/zones', headers={'host': '[::1]:8000'}).status_code == 200

def test_headers(web):
    for path in ('/', '/login', '/api/zones', '/nothing', '/health'):
        h = web.get(path).headers
        assert h['x-content-type-options'] == 'nosniff' and h['x-frame-options'] == 'DENY' and h['referrer-policy'] == 'same-origin' and "frame-ancestors 'none'" in h['content-security-policy']
        assert 'unsafe' not in h['content-security-policy']

@pytest.mark.parametrize('name', ['live.html', 'login.html'])
def test_pages_load_nothing_from_elsewhere(name):
    text, policy = page(name)
    assert not re.search(r'(?:src|href|url\()\s*=?\s*["\']?(?:https?:)?//', text) and 'http' not in text.replace('http://www.w3.org/2000/svg', '')
    assert not re.search(r'\son\w+=|style="', text) and 'innerHTML' not in text and "default-src 'none'" in policy

def colours(text, names): # of the page in the light, 0 to 1
    found = (re.search(rf'--{n}: #(\w{{6}})', text)[1] for n in names)
    return np.array([[int(h[i:i+2], 16)/255 for i in (0, 2, 4)] for h in found])

def linear(rgb): return np.where(rgb <= .04045, rgb/12.92, ((rgb + .055)/1.055)**2.4)

@pytest.mark.parametrize('eye, seen', [('of most', np.eye(3)),
    ('without red', [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]]),
    ('without green', [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.01182, .04294, .968881]]),
    ('without blue', [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .3039]])])
def test_levels_look_different_to_every_eye(eye, seen):
    "Colours as the colour-blind see them (Machado, Oliveira, Fernandes 2009), their distance in CIE Lab"
    import cv2
    levels = 'clear', 'busy', 'crowded', 'critical'
    rgb = np.clip(linear(colours(page('live.html')[0], levels))@np.array(seen).T, 0, 1)
    rgb = np.where(rgb <= .0031308, 12.92*rgb, 1.055*rgb**(1/2.4) - .055).astype(np.float32)
    lab = cv2.cvtColor(rgb[None], cv2.COLOR_RGB2LAB)[0]
    for (a, x), (b, y) in itertools.combinations(zip(levels, lab), 2): assert np.linalg.norm(x - y) > 15, (a, b, eye)

def test_white_words_stand_out():
    "Contrast of 4.5 to 1 or more (WCAG 2, AA)"
    names = 'clear', 'critical', 'unknown', 'streak'
    for n, light in zip(names, linear(colours(page('live.html')[0], names))@[.2126, .7152, .0722]): assert 1.05/(light + .05) >= 4.5, n

# ---- pictures that are sent

def test_count_by_form_and_by_body(web):
    jpeg = encode_jpeg(dots(9))
    for r in (web.post('/api/count', files={'picture': jpeg}), web.post('/api/count', content=jpeg, headers={'content-type': 'image/jpeg'}), web.post('/api/count', files={'anything': ('x.bin', jpeg)})):
        assert r.status_code == 200 and r.json()['count'] == pytest.approx(9, abs=2) and r.json()['low'] < r.json()['high']

def png_of(width, height):
    def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(bytes(10**6))) + chunk(b'IEND', b'')

@pytest.mark.parametrize('data', [b'', b'no picture', encode_jpeg(dots(3))[:900], png_of(50000, 50000), png_of(6000, 6000), png_of(8, 8), b'<svg xmlns="http://www.w3.org/2000/svg"/>', b'%PDF-1.4', b'GIF89a' + bytes(40)])
def test_what_is_no_picture_is_refused(web, data):
    for r in (web.post('/api/count', files={'picture': ('p', data)}), web.post('/api/count', content=data)):
        assert r.status_code in (400, 413, 422) and 'Traceback' not in r.text, r.text

def test_too_long_a_body_is_refused(web, monkeypatch):
    monkeypatch.setattr(serve, 'MAX_BODY', 10_000)
    assert web.post('/api/count', content=bytes(10_001)).status_code == 413
    def drip():
        for _ in range(20): yield bytes(1000)
    assert web.post('/api/count', content=drip()).status_code == 413
    assert web.post('/api/count', content=b'x', headers={'content-length': 'many'}).status_code in (400, 413)

def test_broken_forms(web):
    for body, kind in ((b'--x\r\n', 'multipart/form-data; boundary=x'), (b'junk', 'multipart/form-data'), (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--', 'multipart/form-data; boundary=x'),
                       (b'\xff\xfe', 'application/json'), (b'{', 'application/json'), (b'\xf5\x00', 'text/plain'), (b'\xf5\x00', None)):
        for path in ('/api/count', '/login', '/api/events/x/acknowledge'):
            r = web.post(path, content=body, headers={'content-type': kind} if kind else {})
            assert 400 <= r.status_code < 500 and 'Traceback' not in r.text, (path, body, r.status_code, r.text)

def test_visitors_wait_in_a_short_queue(web):
    desk = web.app.state.desk
    desk.waiting = 4
    assert web.post('/api/count', files={'picture': encode_jpeg(dots(3))}).status_code == 429
    desk.waiting = 0

# ---- fuzzed

def fuzz(examples):
    schemathesis = pytest.importorskip('schemathesis')
    import schemathesis.specs.openapi.checks as rules
    from hypothesis import HealthCheck, Phase, given, settings
    stage = Stage()
    with server(stage) as (base, _, _):
        schema = schemathesis.openapi.from_url(base + 'openapi.json')
        seen, checks = [], [getattr(rules, n) for n in ('status_code_conformance', 'content_type_conformance', 'response_schema_conformance')]
        for result in schema.get_all_operations():
            op = result.ok()
            if op.path == '/api/stream': continue # never ends
            @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
            @given(case=op.as_strategy())
            def ask(case):
                r = case.call(timeout=20)
                seen.append(r.status_code)
                assert r.status_code < 500, (case.as_curl_command(), r.text)
                assert 'Traceback' not in r.text
                case.validate_response(r, checks=checks)
            ask()
    return seen

def test_fuzzed_requests(): assert len(fuzz(8)) > 40

@pytest.mark.slow
def test_fuzzed_requests_long():
    seen = fuzz(400)
    print(f'{len(seen)} fuzzed requests, statuses {sorted(set(seen))}')

# ---- the verb and the page

@contextmanager
def server(stage):
    "A real server in a thread: (address, stage, stop)"
    port = free_port()
    s = serve.Server(stage.app, host='127.0.0.1', port=port)
    t = threading.Thread(target=s.run, daemon=True)
    t.start()
    until(lambda: s.started, 20)
    def stop():
        s.should_exit = True
        t.join(10)
    try: yield f'http://127.0.0.1:{port}/', stage, stop
    finally: stop()

def test_serve_the_verb(tmp_path):
    write_video(tmp_path/'v.avi', (dots(60, i) for i in range(60)), 10)
    (tmp_path/'site.toml').write_text(site_text({'gate': 'v.avi'}))
    port = free_port()
    code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from watching import Dots; from crowd_density.serve import serve; sys.exit(serve("site.toml", port={port}, model=Dots(), loop=True))'
    p = subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert f'http://127.0.0.1:{port}/' in p.stdout.readline()
        import httpx
        def asks(path):
            try: return httpx.get(f'http://127.0.0.1:{port}{path}', timeout=5)
            except httpx.HTTPError: return None
        until(lambda: (r := asks('/ready')) is not None and r.status_code == 200, 20)
        until(lambda: asks('/api/readings').json(), 10)
        if sys.platform.startswith('linux'): # all of 127.0.0.0/8 is this machine, and one address of it is listened on
            with pytest.raises(ConnectionRefusedError): socket.create_connection(('127.0.0.2', port), 2)
        p.send_signal(signal.SIGTERM)
        assert p.wait(15) in (0, -signal.SIGTERM)
    finally: p.kill()
    assert 'Traceback' not in p.stderr.read()

def test_serve_on_every_address_with_a_token(tmp_path):
    import httpx
    write_video(tmp_path/'v.avi', (dots(60, i) for i in range(60)), 10)
    (tmp_path/'site.toml').write_text(site_text({'gate': 'v.avi'}))
    code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from watching import Dots; from crowd_density.serve import serve; sys.exit(serve("site.toml", host="0.0.0.0", port=0, model=Dots(), loop=True))'
    with subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=dict(os.environ, CROWD_DENSITY_TOKEN=TOKEN)) as p:
        try:
            url = 'http://127.0.0.2:' + re.search(r':(\d+)/', p.stdout.readline())[1]
            def asks(path, **headers):
                try: return httpx.get(url + path, timeout=5, headers=headers).status_code
                except httpx.HTTPError: return None
            until(lambda: asks('/ready') == 200, 20)
            assert [asks('/api/zones'), asks('/api/zones', authorization='Bearer ' + TOKEN[:-1]), asks('/api/zones', authorization=f'Bearer {TOKEN}')] == [401, 401, 200]
        finally: p.kill()

def test_serve_over_https(tmp_path):
    import httpx, ssl
    from watching import has
    subprocess.run([has('openssl', 'openssl'), 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=localhost', '-addext', 'subjectAltName=IP:127.0.0.1',
                    '-keyout', 'key.pem', '-out', 'cert.pem'], cwd=tmp_path, check=True, capture_output=True)
    write_video(tmp_path/'v.avi', (dots(60, i) for i in range(60)), 10)
    (tmp_path/'site.toml').write_text(site_text({'gate': 'v.avi'}))
    code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from watching import Dots; from crowd_density.serve import serve; sys.exit(serve("site.toml", port=0, model=Dots(), loop=True, certificate="cert.pem", key="key.pem"))'
    env = dict(os.environ, CROWD_DENSITY_PASSWORD=PASSWORD)
    with subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=env) as p:
        try:
            url = re.search(r'https://127.0.0.1:\d+/', p.stdout.readline())[0]
            with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=str(tmp_path/'cert.pem')), timeout=5) as web:
                def ready():
                    try: return web.get('ready').status_code == 200
                    except httpx.HTTPError: return False
                until(ready, 20)
                r = web.post('login', data=dict(password=PASSWORD))
                assert r.status_code == 303 and 'secure' in r.headers['set-cookie'].lower() and web.get('api/zones').status_code == 200
        finally: p.kill()

def screenshot(d, name): # RGB; kept where CROWD_DENSITY_SHOTS says
    import cv2
    png = d.get_screenshot_as_png()
    if folder := os.environ.get('CROWD_DENSITY_SHOTS'): Path(folder, f'{name}.png').write_bytes(png)
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]

def painted(rgb, name): # pixels of one of the page's colours
    return int((np.abs(rgb - 255*colours(page('live.html')[0], [name])[0]).max(-1) < 3).sum())

def test_page_in_a_browser(tmp_path):
    stage = Stage(('gate', 'stairs <b>'))
    with browser(tmp_path) as d, server(stage) as (base, _, stop):
        d.get(base)
        def text(css): return d.execute_script('return document.querySelector(arguments[0])?.innerText ?? ""', css)
        until(lambda: text('#summary') == '2 clear' and 'people per m²' in text('#tiles'), 20)
        until(lambda: text('#link') == 'connected')
        assert len(d.find_elements('css selector', 'article')) == 2
        assert 'stairs <b>' in text('#tiles') # names are text, not markup
        until(lambda: d.execute_script('return document.querySelector(".view img").naturalWidth') == 64)
        assert re.search(r'[\d.]+ people per m²', text('.big')) and re.search(r'[\d.]+ to [\d.]+ per m².*about \d+ people', text('.facts')) # interval, count
        assert 'read now' in text('.zone') or 's ago' in text('.zone')
        until(lambda: d.execute_script('return document.querySelector(".layer").naturalWidth') == 20) # cells of 8 px of a picture of 160
        until(lambda: d.find_elements('css selector', '.spark .line') and d.find_elements('css selector', '.spark .band'), 10) # the last hour
        before = screenshot(d, 'desk-clear')
        stage.n['gate'] = 60 # it fills: said in words, in a pattern, in the title, in the list
        until(lambda: 'critical' in text('#summary'), 20)
        bars = 'return [...document.querySelectorAll("article .badge")].map(b => [b.innerText, b.querySelectorAll("rect[opacity=\\"1\\"]").length])'
        until(lambda: sorted(d.execute_script(bars)) == [['clear', 1], ['critical', 4]]) # said without colour
        after = screenshot(d, 'desk-critical')
        assert painted(before, 'clear') > 500 and painted(before, 'critical') == 0 and painted(after, 'critical') > 500
        until(lambda: 'critical' in d.title and 'critical' in text('#events'), 10)
        d.execute_script('document.querySelector("#who").value = "ann"')
        until(lambda: 'critical' in text('#events li'))
        button = next(b for b in d.find_elements('css selector', '#events button') if 'critical' in b.get_attribute('aria-label'))
        button.click()
        until(lambda: 'by ann' in text('#events'), 10)
        stage.lost.add('stairs <b>') # a lost camera says why
        until(lambda: 'unknown' in text('#summary') and 'pulled cable' in text('#tiles'), 15)
        d.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=360, height=740, deviceScaleFactor=1, mobile=True)) # a phone: one column, nothing cut off
        until(lambda: d.execute_script('return window.innerWidth') == 360)
        assert d.execute_script('return document.documentElement.scrollWidth') <= 360
        assert d.execute_script('return [...document.querySelectorAll("article")].every((a, i, all) => a.offsetLeft == all[0].offsetLeft && a.offsetWidth > 300)')
        assert d.execute_script('return [...document.querySelectorAll("#events button")].every(b => b.offsetHeight >= 40)') # for thumbs
        screenshot(d, 'desk-phone')
        stop() # the server is gone: said plainly, and nothing looks alive
        until(lambda: 'lost' in text('#lost'), 30)
        until(lambda: text('#summary') == '2 unknown', 30)
        assert 'no connection' in d.title
        errors = [m for m in d.get_log('browser') if 'Content Security Policy' in m['message'] or 'TypeError' in m['message'] or 'ReferenceError' in m['message']]
        assert not errors, errors

def test_page_finds_a_server_that_comes_back(tmp_path):
    port, h = free_port(), tmp_path/'h.db'
    def up():
        s = serve.Server(Stage(history=History(h)).app, host='127.0.0.1', port=port)
        t = threading.Thread(target=s.run, daemon=True)
        t.start()
        until(lambda: s.started, 20)
        return s, t
    def down(s, t):
        s.should_exit = True
        t.join(10)
    with browser(tmp_path) as d:
        def text(css): return d.execute_script('return document.querySelector(arguments[0])?.innerText ?? ""', css)
        s, t = up()
        d.get(f'http://127.0.0.1:{port}/')
        until(lambda: '1 clear' in text('#summary'), 20)
        down(s, t)
        until(lambda: 'lost' in text('#lost'), 30)
        s, t = up()
        until(lambda: d.find_element('css selector', '#lost').get_attribute('hidden') and '1 clear' in text('#summary'), 30)
        down(s, t)

def test_login_in_a_browser(tmp_path):
    StaleElementReferenceException = pytest.importorskip('selenium.common.exceptions').StaleElementReferenceException
    stage = Stage(password=PASSWORD)
    def text(of): return d.execute_script(f'return document.querySelector("{of}")?.innerText || ""') # in one step: the page draws itself anew meanwhile
    def entered(password):
        "Type it and press the button; not if a new page has come in between"
        try:
            field = d.find_element('css selector', 'input[type=password]')
            field.clear()
            field.send_keys(password)
            d.find_element('css selector', 'button').click()
        except StaleElementReferenceException: return False
        return True
    with browser(tmp_path) as d, server(stage) as (base, _, stop):
        d.get(base)
        assert d.current_url.endswith('/login')
        for password in ('wrong horse', PASSWORD):
            until(lambda: entered(password))
            if password != PASSWORD: until(lambda: 'not the password' in text('#wrong'))
        until(lambda: d.execute_script('return document.querySelector("#summary")?.innerText') == '1 clear', 20)
        d.execute_script('document.querySelector("#events button").click()')
        until(lambda: 'seen' in text('#events'), 10)
        d.find_element('css selector', '#leave button').click()
        until(lambda: d.current_url.endswith('/login'), 10)
