"The driver of `evaluate` against metrics computed by hand, the tables, the page, README's table"
import json, re
from html.parser import HTMLParser

import numpy as np, pytest, tiny

from crowd_density import data, evaluation, inference, preprocessing, report, synthetic

@pytest.fixture(scope='module')
def street(tmp_path_factory):
    out = tmp_path_factory.mktemp('street')
    synthetic.write_dataset(out, images=6, seed=2, size_hw=(192, 256), test=.5, masks=True)
    return data.open_data(out)

@pytest.fixture(scope='module')
def models(tmp_path_factory):
    d = tmp_path_factory.mktemp('models')
    return dict(counting=inference.load(tiny.counting(d/'counting.onnx')), segmentation=inference.load(tiny.segmentation(d/'segmentation.onnx')))

@pytest.fixture(scope='module')
def runs(street, models): return {k: report.evaluate_model(m, street, split='test') for k, m in models.items()}

def test_counts_by_hand(street, models, runs):
    items = sorted((o for o in street if o.split == 'test'), key=lambda o: o.number)
    true = [o.count() for o in items]
    predicted = [models['counting'].predict(o.rgb()).count for o in items]
    r = runs['counting']
    assert [o['file'] for o in r['per_image']] == [o.name for o in items]
    assert [o['true'] for o in r['per_image']] == true
    assert r['mae'] == pytest.approx(np.abs(np.subtract(predicted, true)).mean())
    assert r['game'][0] == pytest.approx(r['mae'], rel=1e-3)
    assert sorted(r['game']) == pytest.approx(r['game'])
    assert r['baseline']['mae'] == pytest.approx(np.abs(true - np.mean(true)).mean())
    assert r['baseline']['r2'] == pytest.approx(0)

def test_pixels_by_hand(street, models, runs):
    truth, human = [], []
    for o in (o for o in street if o.split == 'test'):
        rgb = o.rgb()
        truth.append(preprocessing.mask(o.points(), rgb.shape[:2]).ravel())
        human.append(models['segmentation'].predict(rgb).mask().ravel())
    t, p = np.concatenate(truth), np.concatenate(human)
    r = runs['segmentation']['pixel']
    assert r['human']['support'] == t.sum()
    assert r['human']['recall'] == pytest.approx((t & p).sum()/t.sum())
    assert r['human']['precision'] == pytest.approx((t & p).sum()/p.sum())
    assert r['accuracy'] == pytest.approx((t == p).mean())
    b = runs['segmentation']['baseline']['pixel']
    assert b['human']['f1'] == 0 and b['accuracy'] == pytest.approx(1 - t.mean()) and b['density_r2'] == 0

def test_keys(runs):
    c, s = runs['counting'], runs['segmentation']
    assert {'n', 'mae', 'rmse', 'nae', 'r2', 'bias', 'game', 'localisation', 'pixel', 'baseline', 'per_image'} <= set(c)
    assert {'n', 'pixel', 'baseline', 'per_image'} <= set(s) and not {'mae', 'game', 'localisation'} & set(s)
    assert set(c['localisation']) == {'4', '8'} and len(c['game']) == 4
    assert {'human', 'background', 'accuracy', 'macro', 'weighted', 'density_r2'} <= set(s['pixel'])
    for r in runs.values():
        given = {k for k in r['baseline']} - {'heatmap_mean'}
        assert given <= set(r) and {k for k in ('mae', 'pixel', 'game', 'localisation') if k in r} <= given
        json.dumps(r, allow_nan=False)
    assert all(0 <= o['true'] <= 1 and 0 <= o['predicted'] <= 1 for o in s['per_image'])

def test_every_takes_by_number(street, models):
    r = report.evaluate_model(models['counting'], street, split='test', every=2)
    assert r['n'] == 2 and r['every'] == 2

def test_names_that_repeat_get_their_path(street, models):
    r = report.evaluate_model(models['counting'], street, split='all')
    assert len({o['file'] for o in r['per_image']}) == r['n'] == 6

def test_unreadable_pictures_are_named(street, models):
    class Broken(data.Item):
        def rgb(self): raise data.DataError(self.image, 'a picture', 'nothing')
    items = street.select(split='test')
    bad = Broken(**{k: getattr(items[0], k) for k in items[0].__dataclass_fields__})
    r = report.evaluate_model(models['counting'], data.CrowdData([bad, *items[1:]], street.root, street.layout), split='test')
    assert r['n'] == 2 and len(r['failed']) == 1
    with pytest.raises(data.DataError, match='none of 1'):
        report.evaluate_model(models['counting'], data.CrowdData([bad], street.root, street.layout), split='test')

def test_interval_and_coverage():
    class Sure:
        task, card = 'counting', {}
    a = report.Answers(Sure())
    for i in range(10):
        e = inference.Estimate(10., 5., 15., .1, np.full((4, 4), 10/16, np.float32), 8, (32, 32))
        a.add(data.Item(report.Path(f'{i}.jpg')), (32, 32), np.random.default_rng(i).uniform(0, 31, (10 if i < 8 else 30, 2)), e)
    c = report.coverage(a)
    assert c['covered'] == .8 and c['low'] < .8 < c['high']
    assert report.spread(a)['mae'][0] <= evaluation.count_scores(a.true, a.predicted)['mae'] <= report.spread(a)['mae'][1]

def test_figures_and_page(street, models, tmp_path):
    for k, m in models.items():
        report.evaluate_model(m, street, split='test', figures=tmp_path/k)
        names = {p.name for p in (tmp_path/k).iterdir()}
        assert {'scatter.png', 'residuals.png', 'triptychs.png', 'worst_best.png', 'report.html'} <= names
        assert ('precision_recall.png' in names) == (k == 'segmentation')
        check_page((tmp_path/k/'report.html').read_text(encoding='utf-8'))

class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []
    def handle_starttag(self, tag, attrs):
        if tag not in ('meta', 'img'): self.open.append(tag)
        self.sources += [v for k, v in attrs if k in ('src', 'href')]
    def handle_endtag(self, tag): assert self.open.pop() == tag

def check_page(text):
    p = Page()
    p.feed(text)
    assert not p.open and p.sources and all(o.startswith('data:image/') for o in p.sources)
    assert not re.search('https?://|<script|>nan<', text)

def test_page_escapes():
    text = report.page('<b>', [('<i>', [report.text('<script>alert(1)</script>'), report.html_table('<t>', ['<h>'], [['<c>'], [None], [1.5], [12345]])])])
    assert '<script>' not in text and '<b>' not in text and '<c>' not in text and '12,345' in text

@pytest.mark.parametrize('f1, alike, ok', [(.6, .1, True), (.59, .0, False), (.9, .11, False), (float('nan'), 0., False)])
def test_verdict(f1, alike, ok):
    v = report.verdict(f1, alike)
    assert v['ok'] == ok and bool(v['short']) != ok

def test_lookalike_share(street, models):
    v = report.lookalike_share(models['segmentation'], street.select(split='test'))
    assert 0 <= v <= 1

def test_publish_and_results_table(models, runs, tmp_path):
    p = tiny.segmentation(tmp_path/'segmentation.onnx')
    (tmp_path/'r.json').write_text(json.dumps(runs['segmentation']))
    report.publish(p, {'generated, test': tmp_path/'r.json'})
    card = inference.load(p).card
    text = report.results_table(dict(segmentation=card))
    f1 = runs['segmentation']['pixel']['human']['f1']
    assert f' / {f1:.3f} |' in text and 'per_image' not in card['figures']['evaluate']['generated, test']
    assert inference.load(p).predict(np.full((64, 64, 3), 200, np.uint8)).share > .5

@pytest.mark.slow
def test_demo(tmp_path):
    "The demo as README promises it: good enough, one page, under eight minutes of two quiet cores"
    import os, time
    start = time.process_time() + sum(os.times()[2:4])
    assert report.demo(tmp_path/'demo') == 0
    assert time.process_time() + sum(os.times()[2:4]) - start < 2*8*60
    figures = json.loads((tmp_path/'demo'/'demo.json').read_text(encoding='utf-8'))
    assert figures['verdict']['human_f1'] >= .60 and figures['verdict']['lookalikes_called_human'] <= .10
    check_page((tmp_path/'demo'/'report.html').read_text(encoding='utf-8'))

def test_errors_by_group_are_those_of_the_group():
    rng = np.random.default_rng(0)
    rows = [dict(file=f'{i}.jpg', true=int(t), predicted=float(t + e)) for i, (t, e) in enumerate(zip(rng.integers(10, 900, 60), rng.normal(0, 20, 60)))]
    like = [dict(part='AB'[i % 2], place=f'{"AB"[i % 2]}{i//6}', light=float(rng.random()), head=float(rng.uniform(4, 60))) for i in range(60)]
    found = report.error_analysis(rows, like)
    for part in 'AB':
        off = [r['predicted'] - r['true'] for r, o in zip(rows, like) if o['part'] == part]
        assert found[f'part {part}']['n'] == len(off)
        assert found[f'part {part}']['mae'] == pytest.approx(np.abs(off).mean(), abs=1e-3)
        assert found[f'part {part}']['bias'] == pytest.approx(np.mean(off), abs=1e-3)
    for name in ('people', 'heads', 'light'): assert sum(v['n'] for k, v in found.items() if k.startswith(name)) == 60
    assert sum(k.startswith('place') for k in found) == 5

@pytest.mark.parametrize('n', [0, 1])
def test_head_size_of_nobody_is_unknown(n):
    assert np.isnan(report.head_size(np.zeros((n, 2))))
    like = [dict(part='A', place='A1', light=.5, head=h) for h in (np.nan, 10., 20., 30.)]
    assert report.error_analysis([dict(true=1, predicted=1)]*4, like)['heads unknown']['n'] == 1
