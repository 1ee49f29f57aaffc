"Ratios of CPU seconds of one run: to the usual per-head loop, and to decoding and encoding the pictures alone"
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np, pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from crowd_density import preprocessing as pp
from crowd_density.data import CrowdData, Item, inside, open_data, read_rgb

pytest.importorskip('pytest_benchmark')

def best(f, n=3):
    "CPU seconds of the fastest of `n` calls: the one that others disturbed least"
    times = []
    for _ in range(n):
        t = time.process_time()
        f()
        times.append(time.process_time() - t)
    return min(times)

def one_head(xy, size_hw):
    "A step of the usual loop: a full-picture Gaussian filter for one head"
    one = np.zeros(size_hw, np.float32)
    one[int(xy[1]), int(xy[0])] = 1
    return gaussian_filter(one, 4)

def like_part_a():
    "Heads of ten pictures, as many and as large as part A's train half has them (33 to 3,138, mean 541)"
    rng = np.random.default_rng(0)
    for n in (33, 90, 150, 220, 300, 400, 560, 800, 1100, 1757):
        hw = (int(rng.integers(400, 769)), int(rng.integers(600, 1025)))
        yield rng.uniform(0, hw[::-1], (n, 2)), hw

def part_a(real_data):
    "Heads of every 30th picture of part A"
    for item in open_data(real_data/'shanghaitech').select('A')[::30]: yield item.points(), item.rgb().shape[:2]

def ratio_to_loop(crowds, benchmark):
    "CPU seconds of the loop, from three of its equal steps for each picture, over seconds of `density`"
    crowds = list(crowds)
    loop = sum(best(lambda: one_head(inside(p, hw)[0], hw), 3)*len(inside(p, hw)) for p, hw in crowds)
    ours = lambda: [pp.density(p, hw) for p, hw in crowds]
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    ratio = loop/best(ours, 5)
    benchmark.extra_info.update(loop_seconds=round(loop, 2), times_faster_than_loop=round(ratio))
    n = sum(len(p) for p, _ in crowds)
    print(f'\n{len(crowds)} pictures, {n} heads: {ratio:.0f} times faster than the per-head loop')
    return ratio

@pytest.mark.benchmark(disable_gc=True)
def test_density_beats_the_loop(benchmark): assert ratio_to_loop(like_part_a(), benchmark) >= 100

def test_density_beats_the_loop_on_part_a(benchmark, real_data):
    ratio = ratio_to_loop(part_a(real_data), benchmark)
    assert ratio >= 100

def photos(folder, n=20):
    "Smooth, noisy JPEGs of 1024x768, about as large as photographs are"
    rng, items = np.random.default_rng(0), []
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 255, (96, 128, 3), np.uint8))
        smooth = np.asarray(small.resize((1024, 768), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 6, (768, 1024, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder/f'{i}.jpg', quality=85)
        heads = rng.uniform(0, [1024, 768], (500, 2))
        (folder/f'{i}.csv').write_text('x,y\n' + ''.join(f'{x:.2f},{y:.2f}\n' for x, y in heads))
        items.append(Item(folder/f'{i}.jpg', folder/f'{i}.csv'))
    return CrowdData(items, folder)

def code_pictures(data, made, folder):
    "Decode the whole of each photograph and write the square that `prepare` made of it, with no targets and no resize"
    folder.mkdir(exist_ok=True)
    for i, (item, rgb) in enumerate(zip(data, made)):
        read_rgb(item.image)
        (folder/f'{i}.png').write_bytes(pp._png(rgb))

def ratio_to_coding(data, tmp_path, benchmark, rounds=7):
    "CPU seconds of `prepare` over those of coding its pictures alone, both in one worker: the median of pairs by turns"
    outs = iter(tmp_path/f'out{i}' for i in range(99))
    ours = lambda: pp.prepare(data, next(outs), workers=1)
    benchmark.pedantic(ours, rounds=2)
    made = [np.asarray(Image.open(p.image)) for p in pp.read_pairs(tmp_path/'out0')]
    def alone():
        with ThreadPoolExecutor(1) as pool: pool.submit(code_pictures, data, made, tmp_path/'again').result()
    ratio = np.median([best(ours, 1)/best(alone, 1) for _ in range(rounds)])
    benchmark.extra_info.update(times_coding=round(ratio, 2))
    print(f'\n{len(data)} pictures: {ratio:.2f} times decoding and encoding the pictures alone')
    return ratio

def test_prepare_is_near_to_coding_alone(benchmark, tmp_path):
    (tmp_path/'photos').mkdir()
    assert ratio_to_coding(photos(tmp_path/'photos'), tmp_path, benchmark) <= 2

def test_prepare_is_near_to_coding_alone_on_part_a(benchmark, tmp_path, real_data):
    assert ratio_to_coding(open_data(real_data/'shanghaitech').select('A')[::10], tmp_path, benchmark) <= 2

def test_prepare_is_near_to_coding_alone_on_part_b(benchmark, tmp_path, real_data):
    assert ratio_to_coding(open_data(real_data/'shanghaitech').select('B')[::20], tmp_path, benchmark) <= 2
