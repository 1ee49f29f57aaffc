"What all tests share: no network, no windows, `--slow`, the real data where there is some"
import os, socket
from pathlib import Path

os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ['HF_HUB_OFFLINE'] = '1'

import pytest

ROOT = Path(__file__).parents[1]
_local = {'localhost', 'ip6-localhost', '0.0.0.0', '::', '::1', '', None}

def _is_local(host):
    host = host.decode() if isinstance(host, bytes) else host
    return host in _local or str(host).startswith('127.') or host == socket.gethostname()

def pytest_addoption(parser): parser.addoption('--slow', action='store_true', default=False, help='run what takes minutes, too')

def pytest_collection_modifyitems(config, items):
    if config.getoption('--slow'): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='takes minutes: run with --slow'))

@pytest.fixture(autouse=True)
def offline(monkeypatch):
    "A test that reaches for the network fails and says so"
    connect, lookup = socket.socket.connect, socket.getaddrinfo
    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            raise OSError(f'tests have no network: {address[0]}')
        return connect(self, address)
    def looked_up(host, *args, **kwargs):
        if not _is_local(host): raise socket.gaierror(f'tests have no network: {host}')
        return lookup(host, *args, **kwargs)
    monkeypatch.setattr(socket.socket, 'connect', guarded)
    monkeypatch.setattr(socket, 'getaddrinfo', looked_up)

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture
def one_thread():
    "torch's sums in one order: two threads round otherwise than one"
    import torch
    torch.set_num_threads(1)

@pytest.fixture(scope='session')
def real_data():
    "Folder of real data sets; its tests skip where `CROWD_DENSITY_DATA` is unset"
    path = os.environ.get('CROWD_DENSITY_DATA')
    if not path: pytest.skip('CROWD_DENSITY_DATA is unset: no real data')
    if not Path(path).is_dir(): pytest.skip(f'CROWD_DENSITY_DATA: no folder {path}')
    return Path(path)
