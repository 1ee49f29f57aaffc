"Stand-ins for cameras, models and receivers, shared by the tests of watch and serve"
import json, shutil, socket, subprocess, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2, numpy as np, pytest

from crowd_density.ground import MIN_CONTRAST, parse_site
from crowd_density.inference import Estimate
from crowd_density.watch import Source, SourceError

SIZE = 120, 160 # height, width of the stand-ins' pictures, pixels
SIDES = 4., 3.  # metres of the ground that they show: 12 m²

class Dots:
    "Stands in for a model: counts bright dots of about 16 px at 160x120"
    def __init__(self, seconds=0.): self.seconds, self.calls = seconds, 0

    def predict(self, rgb):
        self.calls += 1
        if self.seconds: time.sleep(self.seconds)
        h, w = rgb.shape[:2]
        bright = (rgb[..., 1] > 190).astype(np.float32)/16*(SIZE[0]*SIZE[1])/(h*w)
        rows, cols = -(-h//8), -(-w//8)
        density = np.pad(bright, ((0, rows*8 - h), (0, cols*8 - w))).reshape(rows, 8, cols, 8).sum((1, 3))
        n = float(density.sum())
        return Estimate(count=n, low=.9*n, high=1.1*n, share=float((density > 0).mean()), density=density, cell=8, size_hw=(h, w))

def dots(n, i=0, size_hw=SIZE, noise=3):
    "A noisy square on which `n` dots stand"
    h, w = SIZE
    rgb = np.tile(np.linspace(20, 110, w)[None, :, None], (h, 1, 3))
    for k in range(n): rgb[9*(k//12) + 8:9*(k//12) + 12, 12*(k % 12) + 9:12*(k % 12) + 13] = 255
    if size_hw != SIZE: rgb = cv2.resize(rgb, size_hw[::-1], interpolation=cv2.INTER_NEAREST)
    return np.clip(rgb + np.random.default_rng(i).normal(0, noise, rgb.shape), 0, 255).astype(np.uint8)

CAMERA = '''
[[camera]]
name = "{name}"
source = "{source}"
rate = {rate}
stale_after = {stale_after}
min_contrast = {min_contrast}
[camera.ground]
points_px = [[0, 0], [160, 0], [160, 120], [0, 120]]
points_m = [[0, 0], [4, 0], [4, 3], [0, 3]]
size_px = [160, 120]
head_m = 0
[[camera.zone]]
name = "square"
polygon_m = [[0, 0], [4, 0], [4, 3], [0, 3]]
[camera.zone.levels]
busy = {{enter = 2.0, leave = 1.6, for = {for_}, hold = {hold}}}
crowded = {{enter = 4.0, leave = 3.2, for = {for_}, hold = {hold}}}
critical = {{enter = 5.0, leave = 4.0, for = {for_}, hold = {hold}}}
'''

def site_text(sources, # {name: source}
              rate=1., stale_after=5., for_=3, hold=5, min_contrast=MIN_CONTRAST):
    rest = dict(rate=rate, stale_after=stale_after, for_=for_, hold=hold, min_contrast=min_contrast)
    return ''.join(CAMERA.format(name=n, source=s, **rest) for n, s in sources.items())

def make_site(sources, **kwargs): return parse_site(site_text(sources, **kwargs))

class Hand(Source):
    "A camera that shows what `paint(number)` gives, at `fps`; None is a lost picture"
    def __init__(self, camera, paint, fps=20.):
        super().__init__(camera)
        self.paint, self.fps, self.shown_at = paint, fps, {}

    def pictures(self):
        i = 0
        while not self.stopping.wait(1/self.fps):
            i += 1
            rgb = self.paint(i)
            if rgb is None: raise SourceError(self.shown, 'a picture', 'a pulled cable')
            yield lambda: rgb

def write_video(path, frames, fps=10., code='MJPG'):
    "A video file of `frames`"
    w = None
    for rgb in frames:
        if w is None: w = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), fps, rgb.shape[1::-1])
        w.write(np.ascontiguousarray(rgb[..., ::-1]))
    w.release()
    return path

def until(true, seconds=10., every=.02):
    "Wait until `true()`, or fail"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if got := true(): return got
        time.sleep(every)
    raise AssertionError(f'not within {seconds} s: {true}')

def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s: return s.getsockname()[1]

class Receiver(ThreadingHTTPServer):
    "A webhook's other end, which can fail and hang"
    daemon_threads = True
    def __init__(self, port=0, mode='ok'):
        self.got, self.times, self.mode = [], [], mode
        super().__init__(('127.0.0.1', port), _Receive)
        threading.Thread(target=self.serve_forever, args=(.02,), daemon=True).start()

    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}/hook'
    def ids(self): return [e['id'] for e in (json.loads(b) for _, b in self.got)]
    def end(self): self.shutdown(), self.server_close()

class _Receive(BaseHTTPRequestHandler):
    def do_POST(self):
        body, mode = self.rfile.read(int(self.headers['content-length'])), self.server.mode
        if mode == 'hang': time.sleep(3)
        if mode == 'drop': return self.connection.close()
        if mode == 'ok': self.server.got.append((dict(self.headers), body)), self.server.times.append(time.monotonic())
        self.send_response(dict(ok=204, fail=503).get(mode, 204))
        self.end_headers()
    def log_message(self, *args): pass

RTSP = '''
import sys, gi
gi.require_version('Gst', '1.0'); gi.require_version('GstRtspServer', '1.0')
from gi.repository import Gst, GstRtspServer, GLib
Gst.init(None)
port, launch = sys.argv[1:]
server = GstRtspServer.RTSPServer()
server.set_address('127.0.0.1'); server.set_service(port)
f = GstRtspServer.RTSPMediaFactory()
f.set_launch(launch); f.set_shared(True)
server.get_mount_points().add_factory('/live', f)
if not server.attach(None): sys.exit('no port')
print('ready', flush=True)
GLib.MainLoop().run()
'''

def pattern(size=(160, 120), fps=10, what='videotestsrc is-live=true pattern=ball foreground-color=0xff909090 background-color=0xff505050'):
    "What a GStreamer RTSP server plays"
    return (f'( {what} ! videorate ! videoscale ! videoconvert ! video/x-raw,width={size[0]},height={size[1]},framerate={fps}/1,format=I420 '
            f'! x264enc tune=zerolatency speed-preset=ultrafast key-int-max={fps} bitrate=800 ! rtph264pay name=pay0 pt=96 )')

def has_rtsp():
    "Skip where the system has no GStreamer RTSP server"
    code = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
    if not Path('/usr/bin/python3').exists() or subprocess.run(['/usr/bin/python3', '-c', code], capture_output=True).returncode:
        pytest.skip('no GStreamer RTSP server (Debian: gir1.2-gst-rtsp-server-1.0 python3-gi)')

@contextmanager
def rtsp(port, launch=None):
    "An RTSP server at rtsp://127.0.0.1:port/live, killed at the end"
    p = subprocess.Popen(['/usr/bin/python3', '-c', RTSP, str(port), launch or pattern()], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert p.stdout.readline().strip() == 'ready', 'the RTSP server does not start'
        yield p
    finally:
        p.kill()
        p.wait()

def has(name, package):
    "The path of a program, or skip"
    path = shutil.which(name) or next((f'{d}/{name}' for d in ('/usr/sbin', '/usr/local/sbin') if Path(d, name).exists()), None)
    return path or pytest.skip(f'no {name} (Debian: {package})')

@contextmanager
def browser(tmp_path, size=(1280, 900)):
    "Headless Chromium"
    selenium = pytest.importorskip('selenium.webdriver')
    chromium, driver = has('chromium', 'chromium'), has('chromedriver', 'chromium-driver')
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    flags = ('--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run '
             f'--disable-dev-shm-usage --force-device-scale-factor=1 --window-size={size[0]},{size[1]}').split()
    for a in [*flags, f'--user-data-dir={tmp_path/"chromium"}']: options.add_argument(a)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    d = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    try: yield d
    finally: d.quit()
