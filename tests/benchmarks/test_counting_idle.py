"""The cores never wait: of an epoch's time at most a tenth lies outside forward, backward and step.

A callback clocks each batch from `before_batch` to `after_step`; the rest is cutting, disturbing and counting crops, and fastai's own work. The CPU
path as recipe `quick` takes it (256 px, 8 crops, frozen first layers), on generated pictures. Shares of one run, so the machine's mood hits both alike."""
import os, time

import pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders

from crowd_density.counting import Atlas, Average, CountingModel, CropLoader, FixedCrops, RECIPES, add_scenes, counting_learner, flat_cos
from crowd_density.synthetic import scene

pytest.importorskip('pytest_benchmark')
GOAL = .1

class Clock(Callback):
    "Seconds of an epoch's training, and those between `before_batch` and `after_step`"
    order = -100
    def before_fit(self): self.shares = []
    def before_train(self): self.begun, self.busy = time.perf_counter(), 0.
    def before_batch(self): self.t = time.perf_counter()
    def after_step(self): self.busy += time.perf_counter() - self.t
    def after_train(self): self.shares.append(1 - self.busy/(time.perf_counter() - self.begun))

def pictures():
    "Eight photographs of a street, as large as part B's, and some generated scenes"
    atlas = Atlas()
    for i in range(8):
        s = scene(i, (768, 1024))
        atlas.add(s.rgb, s.points_xy, 'B', f'{i}')
    return add_scenes(atlas, 2, 4)

def test_the_cores_never_wait(benchmark):
    recipe, clock = RECIPES['quick'], Clock()
    n = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())
    train = CropLoader(pictures(), recipe['bs'], recipe['size'], per_item=3)
    valid = FixedCrops(add_scenes(Atlas(), 1, 0), recipe['bs'], recipe['size'])
    learn = counting_learner(DataLoaders(train, valid), CountingModel().freeze_to(recipe['frozen']))
    def epochs():
        with learn.no_bar(), learn.no_logging(): learn.fit(4, cbs=[Average(recipe['decay']), flat_cos(recipe['lr']), clock])
    benchmark.pedantic(epochs, rounds=1)
    torch.set_num_threads(n)
    share = min(clock.shares)
    benchmark.extra_info.update(idle_share=round(share, 3))
    print(f'\n{100*share:.1f} % of an epoch outside forward, backward and step (best of {len(clock.shares)}: {[round(o, 3) for o in clock.shares]})')
    assert share <= GOAL
