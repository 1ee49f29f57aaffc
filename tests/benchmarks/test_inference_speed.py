"""A whole `predict` of 1024x768 against CSRNet's computation, interleaved in one run: the machine's mood hits both alike.

CSRNet (VGG-16 to conv4_3, six dilated layers, 1x1; 16.26 million parameters) is built here from its paper, with random weights: only its
computation is timed. `pytest tests/benchmarks/test_inference_speed.py --slow -s` prints the ratios; the goal is 40. A picture that looks crowded is
looked at a second time, at 1.4 megapixels: accuracy comes before speed, so its ratio is lower and stands beside the other."""
import os, time

import numpy as np, pytest

from crowd_density.inference import ModelError, load

GOAL, FLOOR = 40, 4 # what is asked of a quiet machine; below the floor something is broken

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
    "Median seconds of both, run in turns"
    a, b = [], []
    for _ in range(times):
        start = time.perf_counter()
        theirs()
        b.append(time.perf_counter() - start)
        for _ in range(each):
            start = time.perf_counter()
            ours()
            a.append(time.perf_counter() - start)
    return float(np.median(a)), float(np.median(b))

@pytest.mark.slow
def test_predict_against_csrnet():
    import torch
    try: model = load('counting')
    except ModelError as e: pytest.skip(str(e))
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())
    from crowd_density.synthetic import scene
    crowd, net, x = scene(0, size_hw=(768, 1024)).rgb, csrnet(), torch.rand(1, 3, 768, 1024)
    pictures = dict(crowd=crowd, nobody=scene(0, size_hw=(768, 1024), people=0).rgb)
    ratios = {}
    with torch.inference_mode():
        for name, rgb in pictures.items():
            scale = model.predict(rgb).scale
            ours, theirs = interleaved(lambda: model.predict(rgb), lambda: net(x), times=2)
            ratios[name] = theirs/ours
            print(f'\n{name}: predict, complete, 1024x768 (scale {scale:.2f}): {ours:.3f} s; CSRNet in torch: {theirs:.2f} s; ratio {theirs/ours:.1f} (goal {GOAL})')
    assert min(ratios.values()) >= FLOOR

@pytest.mark.slow
def test_what_predict_adds_to_the_network():
    "Resizing, normalising, interval and map cost at most a fifth of the bare network"
    try: model = load('counting')
    except ModelError as e: pytest.skip(str(e))
    from crowd_density.synthetic import scene
    rgb = scene(0, size_hw=(768, 1024)).rgb
    x = model.blob(rgb)
    run = lambda: model.session.run(None, {'image': x})
    run()
    whole, bare = interleaved(lambda: model.predict(rgb, scale=1), run, times=8, each=1)
    print(f'\npredict {whole:.3f} s, bare network {bare:.3f} s')
    assert whole <= 1.25*bare + .02
