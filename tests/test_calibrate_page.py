"The calibrate page: its server by plain requests, and the page driven in headless Chromium on a generated picture"
import http.client, json, os, re, shutil, threading, time
from urllib.parse import urlsplit

import numpy as np, pytest
from PIL import Image

from crowd_density.ground import CalibrateServer, Ground, calibrate, read_site
from crowd_density.synthetic import View, clip

@pytest.fixture(scope='module')
def shot(tmp_path_factory):
    "A clip and the path of one of its pictures"
    c, path = clip(10, 4., 3, fps=1), tmp_path_factory.mktemp('shot')/'square.png'
    Image.fromarray(next(rgb for t, rgb, *_ in c.frames() if t >= 4)).save(path)
    return c, path

@pytest.fixture
def server(shot, tmp_path):
    with CalibrateServer(shot[1], tmp_path/'site.toml') as s:
        thread = threading.Thread(target=s.serve_forever, args=(.02,), daemon=True)
        thread.start()
        yield s
        s.shutdown()
        thread.join()

def ask(server, method, path, body=None, token=None, host=None):
    "Status, headers, body"
    to = urlsplit(server.url)
    c = http.client.HTTPConnection(to.hostname, to.port, timeout=10)
    headers = {'X-Token': server.token if token is None else token, 'Host': host or to.netloc}
    c.request(method, path, body if isinstance(body, (bytes, str, type(None))) else json.dumps(body), headers)
    r = c.getresponse()
    got = r.status, dict(r.getheaders()), r.read()
    c.close()
    return got

def corners(c):
    "A rectangle on the ground around the zone, in pixels, and its sides in metres"
    (x0, y0), (x1, y1) = c.zone_m.min(0), c.zone_m.max(0)
    m = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    return c.view.to_px(np.column_stack([m, np.zeros(4)])), (x1-x0, y1-y0)

# the server

@pytest.mark.parametrize('method, path', [('GET', '/'), ('GET', '/image'), ('GET', '/start'), ('GET', '/none'),
    ('POST', '/solve'), ('POST', '/save'), ('POST', '/close')])
def test_nothing_without_the_token(server, method, path):
    assert ask(server, method, path, {}, token='')[0] == 403
    assert ask(server, method, path, {}, token='wrong')[0] == 403
    assert ask(server, method, path, {}, host='evil.example')[0] == 403
    assert server.saved is None and not server.site.exists()

def test_listens_on_this_machine_only(server): assert server.server_address[0] == '127.0.0.1'

def test_page_needs_no_other_host(server):
    status, headers, body = ask(server, 'GET', urlsplit(server.url).path + '?' + urlsplit(server.url).query)
    text = body.decode()
    assert status == 200
    assert set(re.findall(r'https?://[^\s"\'`]+', text)) <= {'http://www.w3.org/2000/svg'}
    policy = headers['Content-Security-Policy']
    assert "default-src 'none'" in policy and 'unsafe' not in policy
    assert '__NONCE__' not in text and server.token not in text
    assert headers['Cache-Control'] == 'no-store'

@pytest.mark.parametrize('body, status', [(b'{', 400), (b'[]', 400), (b'{"points": 3}', 400), (b'\xff', 400), ({}, 200),
    (b'{"points": [["a", 1]]}', 400), ({'points': [[1, 2]]}, 200)])
def test_odd_bodies(server, body, status):
    got = ask(server, 'POST', '/solve', body)
    assert got[0] == status and 'error' in json.loads(got[2])

@pytest.mark.parametrize('length', ['600000', '-1', 'many', ''])
def test_bodies_of_no_fit_length(server, length):
    to = urlsplit(server.url)
    c = http.client.HTTPConnection(to.hostname, to.port, timeout=10)
    c.putrequest('POST', '/solve')
    for k, v in (('X-Token', server.token), ('Content-Length', length)): c.putheader(k, v)
    c.endheaders()
    assert c.getresponse().status == 413
    c.close()

def test_save_refuses_what_read_site_would(server, shot):
    px, sides = corners(shot[0])
    crossing = dict(name='a', polygon_px=[[10, 400], [200, 470], [200, 400], [10, 470]])
    d = dict(method='rectangle', points=px.tolist(), sides_m=sides, name='gate', zones=[crossing])
    status, _, body = ask(server, 'POST', '/save', d)
    assert status == 422 and 'polygon_px' in json.loads(body)['error'] and not server.site.exists()

def test_save_keeps_other_cameras_and_comments(server, shot):
    px, sides = corners(shot[0])
    d = dict(method='rectangle', points=px.tolist(), sides_m=sides, camera_height_m=6., name='gate',
        source='rtsp://u:${GATE_PW}@h/1', zones=[])
    assert ask(server, 'POST', '/save', d)[0] == 200
    server.site.write_text('# ours\n' + server.site.read_text().replace('name = "gate"', 'name = "gate" # north'))
    assert ask(server, 'POST', '/save', dict(d, name='yard', source='yard.mp4'))[0] == 200
    assert ask(server, 'POST', '/save', dict(d, camera_height_m=7.5, source=''))[0] == 200
    text, site = server.site.read_text(), read_site(server.site, secrets=False)
    assert '# ours' in text and '# north' in text
    assert [c.name for c in site.cameras] == ['gate', 'yard']
    assert site.camera('gate').ground.camera_height_m == 7.5 and site.camera('gate').source == 'rtsp://u:${GATE_PW}@h/1'

# without a browser

def test_from_tables(shot, tmp_path, capsys):
    c, path = shot
    px, (a, b) = corners(c)
    m = [(0, 0), (a, 0), (a, b), (0, b)]
    (tmp_path/'points.csv').write_text('x,y,x_m,y_m\n' + ''.join(f'{x},{y},{u},{v}\n' for (x, y), (u, v) in zip(px, m)))
    (tmp_path/'zones.csv').write_text('zone,x,y\n' + ''.join(f'stage,{x},{y}\n' for x, y in px))
    site, points, zones = (tmp_path/n for n in ('site.toml', 'points.csv', 'zones.csv'))
    assert calibrate(path, site, points=points, zones=zones, name='gate', camera_height_m=c.view.height_m) == 0
    camera = read_site(tmp_path/'site.toml').camera('gate')
    np.testing.assert_allclose(camera.ground.to_ground(px), m, atol=1e-3)
    assert camera.zones[0].name == 'stage' and os.path.samefile(camera.address(), path)
    (tmp_path/'points.csv').write_text('x,y\n1,2\n')
    with pytest.raises(ValueError, match='x,y,x_m,y_m'): calibrate(path, site, points=points)

# the page, driven

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
    chromium, driver = (shutil.which(n) for n in ('chromium', 'chromedriver'))
    if not chromium or not driver: pytest.skip('chromium or chromedriver is not installed (Debian: chromium-driver)')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ('headless', 'no-sandbox', 'disable-gpu', 'disable-background-networking', 'disable-component-update',
        'disable-sync', 'no-first-run', 'disable-dev-shm-usage', 'window-size=1400,1000',
        f'user-data-dir={tmp_path_factory.mktemp("chromium")}'): options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    b = webdriver.Chrome(options, webdriver.ChromeService(driver))
    b.implicitly_wait(5)
    yield b
    b.quit()

def visit(b, url):
    b.get(url)
    until(lambda: b.find_element('tag name', 'body').get_attribute('data-ready'), 'the page')
    b.get_log('browser')

def click(b, xy):
    "Click the picture at pixel `xy`"
    from selenium.webdriver import ActionChains
    stage = b.find_element('id', 'stage')
    box = b.execute_script('const e = arguments[0], r = e.getBoundingClientRect(), v = e.viewBox.baseVal;'
        'return [r.width, r.height, v.width, v.height]', stage)
    dx, dy = ((p+.5)*box[i]/box[2+i] - box[i]/2 for i, p in enumerate(xy))
    ActionChains(b, 0).move_to_element_with_offset(stage, round(dx), round(dy)).click().perform()

def write(b, id, text):
    e = b.find_element('id', id)
    e.clear()
    e.send_keys(text)

def until(f, what, seconds=10):
    end = time.time()+seconds
    while time.time() < end:
        if got := f(): return got
        time.sleep(.05)
    raise AssertionError(f'waited {seconds} s for {what}')

def shoot(b, name):
    "A screenshot, kept where CROWD_DENSITY_SHOTS says"
    if folder := os.environ.get('CROWD_DENSITY_SHOTS'): b.save_screenshot(f'{folder}/{name}.png')

def status(b): return b.find_element('id', 'status').text

def errors(b): return [e for e in b.get_log('browser') if e['level'] == 'SEVERE']

def test_four_clicks_lengths_a_zone_save(browser, server, shot):
    from selenium.webdriver import ActionChains
    b, (c, path) = browser, shot
    visit(b, server.url)
    assert 'token' not in b.current_url
    px, (side_a, side_b) = corners(c)
    for p in px: click(b, p)
    write(b, 'side-a', f'{side_a:.3f}')
    write(b, 'side-b', f'{side_b:.3f}'.replace('.', ','))
    until(lambda: b.find_elements('css selector', '#lines .grid'), 'the grid')
    assert 'as high' in status(b)
    write(b, 'camera-height', f'{c.view.height_m:.2f}')
    until(lambda: 'as high' not in status(b) and 'grid' in status(b), 'the residual')
    hint = b.find_element('id', 'height-hint').text
    assert abs(float(re.search(r'([\d.]+) m', hint)[1])/c.view.height_m-1) < .15
    b.find_element('id', 'mode-zone').click()
    middle = px.mean(0)
    zone = middle + (px-middle)*.8
    for p in zone: click(b, p)
    b.find_element('id', 'finish-zone').click()
    write(b, 'zone-name-0', 'stage')
    write(b, 'zone-0-busy', '1.5')
    until(lambda: 'm²' in b.find_element('css selector', '.zone .area').text, 'the area')
    write(b, 'camera-name', 'gate')
    ActionChains(b).move_to_element_with_offset(b.find_element('id', 'stage'), 60, 120).perform()
    assert b.find_elements('css selector', '#figure .head')
    shoot(b, 'calibrate')
    until(lambda: b.find_element('id', 'save').is_enabled(), 'the button')
    b.find_element('id', 'save').click()
    until(lambda: 'Saved' in status(b), 'saving')
    camera = read_site(server.site).camera('gate')
    g, true = camera.ground, Ground.from_rectangle(px, (side_a, side_b), size_hw=(480, 640))
    assert np.abs(g.to_ground(px)-true.to_ground(px)).max() < .15
    assert g.camera_height_m == round(c.view.height_m, 2) and g.size_hw == (480, 640)
    assert camera.zones[0].name == 'stage' and np.abs(np.array(camera.zones[0].polygon_px)-zone).max() < 1.2
    levels = camera.zones[0].levels
    assert (levels.busy.enter, levels.busy.leave, levels.critical.enter) == (1.5, 1.2, 5)
    assert not errors(b)
    b.find_element('id', 'close').click()
    until(lambda: 'Closed' in status(b), 'closing')

def test_wrong_order_is_said_and_a_corner_is_moved_by_keys(browser, server, shot):
    from selenium.webdriver import Keys
    b, (c, path) = browser, shot
    visit(b, server.url)
    px, _ = corners(c)
    for i in (0, 2, 1, 3): click(b, px[i])
    write(b, 'side-a', '5')
    write(b, 'side-b', '5')
    until(lambda: 'cross' in status(b), 'the complaint')
    assert not b.find_element('id', 'save').is_enabled()
    shoot(b, 'calibrate-wrong')
    for _ in range(4): b.find_element('id', 'undo').click()
    for p in px: click(b, p)
    until(lambda: b.find_elements('css selector', '#lines .grid'), 'the grid')
    x = float(b.find_element('css selector', '[data-key=p0]').get_attribute('cx'))
    b.find_element('css selector', '[data-key=p0]').send_keys(Keys.ARROW_RIGHT*4)
    assert abs(float(b.find_element('css selector', '[data-key=p0]').get_attribute('cx'))-x-2) < .11
    assert not errors(b)

def test_a_saved_camera_comes_back(browser, server, shot):
    b, (c, path) = browser, shot
    px, sides = corners(c)
    d = dict(method='rectangle', points=px.tolist(), sides_m=sides, camera_height_m=6.5, name='gate',
        zones=[dict(name='stage', polygon_px=px.tolist())])
    assert ask(server, 'POST', '/save', d)[0] == 200
    with CalibrateServer(path, server.site) as s:
        threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
        visit(b, s.url)
        b.find_element('css selector', '#known option[value="0"]').click()
        until(lambda: b.find_element('id', 'save').is_enabled(), 'the button')
        b.find_element('id', 'save').click()
        until(lambda: 'Saved' in status(b), 'saving')
        assert not errors(b)
        s.shutdown()
    again = read_site(server.site).camera('gate')
    assert again.ground.camera_height_m == 6.5 and again.zones[0].name == 'stage'
    np.testing.assert_allclose(again.ground.to_ground(px), [(0, 0), (sides[0], 0), sides, (0, sides[1])], atol=.01)

def test_horizon_and_lengths(browser, tmp_path):
    b, view = browser, View(5., .2, 600., (480, 640))
    Image.fromarray(np.full((480, 640, 3), 120, np.uint8)).save(tmp_path/'grey.png')
    ends = view.to_px(np.array([[-2, 8, 0], [2, 8, 0], [1, 8, 0], [1, 14, 0]]))
    with CalibrateServer(tmp_path/'grey.png', tmp_path/'site.toml') as s:
        threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
        visit(b, s.url)
        b.find_element('css selector', 'input[value=horizon]').click()
        for p in ([10, view.horizon], [620, view.horizon], *ends): click(b, p)
        write(b, 'length-0', '4')
        assert 'second' in status(b) or 'length' in status(b)
        write(b, 'length-1', '6')
        until(lambda: b.find_elements('css selector', '#lines .grid'), 'the grid')
        b.find_element('id', 'save').click()
        until(lambda: 'Saved' in status(b), 'saving')
        assert not errors(b)
        s.shutdown()
    g = read_site(tmp_path/'site.toml').cameras[0].ground
    assert abs(g.camera_height_m/5-1) < .08 and abs(np.linalg.norm(np.diff(g.to_ground(ends[:2]), axis=0))-4) < .1
