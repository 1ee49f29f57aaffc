"""A whole `predict` of 1024x768, as it ships (in 8 bits) and in full precision, against CSRNet's computation: CPU seconds of one thread each, in turns in one run.

CSRNet (VGG-16 to conv4_3, six dilated layers, 1x1; 16.26 million parameters) is built here from its paper, with random weights: only its
computation is timed. CPU seconds, since others on the machine disturb clocks more than they disturb work; wall seconds are printed beside them.
`pytest tests/benchmarks/test_inference_speed.py --slow -s` prints the ratios; a picture with nobody, one with a crowd and one that is packed:
whatever the scale rule makes of them is part of `predict`. The default must reach the goal with each of them, full precision a floor."""
import time

import numpy as np, pytest

from crowd_density.inference import ModelError, load

GOAL, FLOOR = 40, 15 # times faster than CSRNet: what the issue asks of the default, and below which full precision is broken

def csrnet():
    "CSRNet's layers in torch"
    torch = pytest.importorskip('torch')
    nn = torch.nn
    def stack(channels, n, dilation=1):
        layers = []
        for c in channels:
            if c == 'M': layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(n, c, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
                n = c
        return layers
    front = [64, 64, 'M', 128, 128, 'M', 256, 256, 256, 'M', 512, 512, 512]
    net = nn.Sequential(*stack(front, 3), *stack([512, 512, 512, 256, 128, 64], 512, 2), nn.Conv2d(64, 1, 1)).eval()
    assert sum(p.numel() for p in net.parameters()) == 16_263_489
    return net

def interleaved(ours, theirs, times=3, each=4):
    "Least seconds of both, run in turns: `(ours, theirs)` of the CPU, and the same by the clock"
    a, b = [], []
    def timed(f, out):
        cpu, clock = time.process_time(), time.perf_counter()
        f()
        out.append((time.process_time() - cpu, time.perf_counter() - clock))
    for _ in range(times):
        timed(theirs, b)
        for _ in range(each): timed(ours, a)
    (cpu, clock), (cpu_b, clock_b) = np.min(a, 0), np.min(b, 0)
    return (float(cpu), float(cpu_b)), (float(clock), float(clock_b))

@pytest.fixture
def one_thread():
    "OpenCV, like torch and ONNX Runtime here, on one thread"
    import cv2
    was = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(was)

@pytest.mark.slow
@pytest.mark.parametrize('int8,least', [(None, GOAL), (False, FLOOR)])
def test_predict_against_csrnet(one_thread, int8, least):
    import torch
    try: model = load('counting', threads=1, int8=int8)
    except ModelError as e: pytest.skip(str(e))
    torch.set_num_threads(1)
    from crowd_density.synthetic import scene
    net, x, ratios = csrnet(), torch.rand(1, 3, 768, 1024), {}
    pictures = {n: scene(0, size_hw=(768, 1024), people=k).rgb for n, k in dict(nobody=0, crowd=100, packed=1500).items()}
    with torch.inference_mode():
        net(x)
        for name, rgb in pictures.items():
            e = model.predict(rgb)
            (ours, theirs), (clock, clock_theirs) = interleaved(lambda: model.predict(rgb), lambda: net(x), times=2)
            ratios[name] = theirs/ours
            print(f'\n{name}: predict, complete, 1024x768 ({e.count:.0f} people, scale {e.scale:.2f}, {model.card.get("bits") or 32} bits): {ours:.3f} s; '
                  f'CSRNet in torch: {theirs:.2f} s; ratio {theirs/ours:.1f} (goal {GOAL}), by the clock {clock_theirs/clock:.1f}')
    assert min(ratios.values()) >= least, ratios

@pytest.mark.slow
def test_what_predict_adds_to_the_network(one_thread):
    "Resizing, normalising, interval and map cost at most a quarter of the bare network, and little beyond"
    try: model = load('counting', threads=1)
    except ModelError as e: pytest.skip(str(e))
    from crowd_density.synthetic import scene
    rgb = scene(0, size_hw=(768, 1024)).rgb
    x = model.blob(rgb)
    run = lambda: model.session.run(None, {'image': x})
    run()
    (whole, bare), _ = interleaved(lambda: model.predict(rgb, scale=1), run, times=8, each=1)
    print(f'\npredict {whole:.3f} s, bare network {bare:.3f} s')
    assert whole <= 1.25*bare + .02
