"Every metric against a slow, obvious reference; baselines; undefined values; figures"
import itertools, json, math, subprocess, sys
from pathlib import Path

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from matplotlib.figure import Figure
from sklearn import metrics

from crowd_density import evaluation as ev
from crowd_density.data import DataError

numbers = st.floats(0, 5000, width=32)
quick = settings(deadline=None, max_examples=60)

@st.composite
def pairs_of(draw, elements=numbers, least=0):
    n = draw(st.integers(least, 30))
    return tuple(draw(st.lists(elements, min_size=n, max_size=n)) for _ in range(2))

# ---- counts

@quick
@given(pairs_of(least=1))
def test_count_scores_equal_loops(pair):
    true, predicted = pair
    n, errors = len(true), [p - t for t, p in zip(*pair)]
    s = ev.count_scores(true, predicted)
    assert list(s) == ['mae', 'rmse', 'nae', 'r2', 'bias']
    assert s['mae'] == pytest.approx(sum(abs(e) for e in errors)/n)
    assert s['rmse'] == pytest.approx(math.sqrt(sum(e*e for e in errors)/n))
    assert s['bias'] == pytest.approx(sum(errors)/n, abs=1e-6)
    assert s['nae'] == pytest.approx(sum(abs(e)/max(t, 1) for t, e in zip(true, errors))/n)
    if n > 1: assert s['r2'] == pytest.approx(metrics.r2_score(true, predicted))
    else: assert math.isnan(s['r2'])
    assert s['rmse'] >= s['mae']*(1 - 1e-9) >= abs(s['bias'])*(1 - 1e-6) - 1e-6

def test_counts_without_pictures_or_people():
    empty = ev.count_scores([], [])
    assert list(empty) == ['mae', 'rmse', 'nae', 'r2', 'bias'] and all(math.isnan(v) for v in empty.values())
    s = ev.count_scores([0, 0], [3, 0])
    assert s['nae'] == 1.5 and all(math.isfinite(v) for v in s.values())
    assert ev.count_scores([0, 0], [0, 0]) == dict(mae=0, rmse=0, nae=0, r2=1, bias=0)
    assert ev.count_baseline([])['mae'] is not None and ev.count_baseline([1, 3], 0)['mae'] == 2
    assert ev.count_scores(np.array([[1], [2]]), (1, 2))['mae'] == 0

@pytest.mark.parametrize('true,predicted', [([1], [1, 2]), ([1], [np.nan]), ([np.inf], [1]), ([], [1])])
def test_counts_that_do_not_pair(true, predicted):
    with pytest.raises(DataError, match='counts: expected'): ev.count_scores(true, predicted)

# ---- GAME

points = st.lists(st.tuples(st.floats(-3, 75, width=32), st.floats(-3, 55, width=32)), max_size=25)

def slow_game(true, predicted, size_hw, level):
    (h, w), n, total = size_hw, 2**level, 0
    for i, j in itertools.product(range(n), range(n)):
        within = lambda x, y: j*w/n <= x < (j + 1)*w/n and i*h/n <= y < (i + 1)*h/n
        total += abs(sum(within(*p) for p in true) - sum(within(*p) for p in predicted))
    return total

@quick
@given(points, points, st.integers(0, 3))
def test_game_equals_a_loop(true, predicted, level):
    assert ev.game(true, predicted, (48, 72), level) == slow_game(true, predicted, (48, 72), level)

@quick
@given(points, points)
def test_game_never_falls_with_the_level(true, predicted):
    g = [ev.game(true, predicted, (50, 70), level) for level in range(5)]
    assert all(a <= b for a, b in zip(g, g[1:])) and ev.game(true, true, (50, 70), 3) == 0

@quick
@given(points, points, st.sampled_from([1, 2, 6]), st.integers(0, 3))
def test_game_of_a_map_of_points_is_game(true, predicted, stride, level):
    from crowd_density.preprocessing import count_grid
    d = count_grid(predicted, (48, 96), stride)
    expected = pytest.approx(ev.game(true, predicted, (48, 96), level), abs=1e-4)
    for s in (None, stride): assert ev.game_of_map(true, d, (48, 96), level, s) == expected

def test_game_of_a_map_with_cells_on_borders():
    d = np.random.default_rng(0).random((7, 9))
    fine = d.repeat(8, 0).repeat(8, 1)/64 # each cell as 8 x 8 equal pixels
    cells = np.array([[fine[14*i:14*i + 14, 18*j:18*j + 18].sum() for j in range(4)] for i in range(4)])
    assert ev.game_of_map([], d, (56, 72), 2) == pytest.approx(d.sum())
    truth = [[1, 1], [70, 50], [35, 20]]
    cells[[0, 3, 1], [0, 3, 1]] -= 1
    assert ev.game_of_map(truth, d, (56, 72), 2) == pytest.approx(np.abs(cells).sum())

def test_a_padded_map_loses_nobody():
    d = np.ones((13, 16))/8
    assert ev.game_of_map([], d, (100, 121), 3, stride=8) == pytest.approx(d.sum())
    assert ev.game_of_map([], np.ones((16, 16)), (100, 121), 0, stride=8) == pytest.approx(256)
    with pytest.raises(DataError, match='covers'): ev.game_of_map([], np.ones((12, 16)), (100, 121), 0, stride=8)
    with pytest.raises(DataError, match='covers'): ev.game_of_map([], np.ones(12), (100, 121), 0)

# ---- localisation

def slow_matching(true, predicted, sigma):
    "Greatest number of pairs by augmenting paths, one after another"
    near = [[j for j, q in enumerate(predicted) if math.dist(p, q) <= sigma] for p in true]
    owner = {}
    def placed(i, seen):
        for j in near[i]:
            if j not in seen:
                seen.add(j)
                if j not in owner or placed(owner[j], seen):
                    owner[j] = i
                    return True
        return False
    return sum(placed(i, set()) for i in range(len(true)))

spots = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=14)

@quick
@given(spots, spots, st.sampled_from([1, 4, 8]))
def test_matching_equals_augmenting_paths(true, predicted, sigma):
    n = ev.matched(true, predicted, sigma)
    assert n == slow_matching(true, predicted, sigma) == ev.matched(predicted, true, sigma)

def test_matching_equals_every_assignment():
    rng = np.random.default_rng(0)
    for _ in range(30):
        t, p = rng.uniform(0, 12, (5, 2)), rng.uniform(0, 12, (5, 2))
        best = max(sum(math.dist(t[i], p[j]) <= 4 for i, j in enumerate(o)) for o in itertools.permutations(range(5)))
        assert ev.matched(t, p, 4) == best

@quick
@given(st.lists(st.tuples(spots, spots), max_size=4), st.sampled_from([4, 8]))
def test_localisation_is_micro(pictures, sigma):
    t, p = [o[0] for o in pictures], [o[1] for o in pictures]
    tp, n, m = sum(slow_matching(*o, sigma) for o in pictures), sum(map(len, t)), sum(map(len, p))
    s = ev.localisation_scores(t, p, sigma)
    if not n and not m: assert all(math.isnan(v) for v in s.values())
    else:
        precision, recall = tp/m if m else 0, tp/n if n else 0
        f1 = 2*precision*recall/(precision + recall) if tp else 0
        assert s == dict(precision=pytest.approx(precision), recall=pytest.approx(recall), f1=pytest.approx(f1))

def test_a_crowd_is_matched_in_reasonable_time():
    rng = np.random.default_rng(0)
    t = rng.uniform(0, [1024, 768], (4000, 2))
    assert ev.matched(t, rng.permutation(t + rng.normal(0, .1, t.shape)), 8) == 4000
    assert ev.localisation_scores([t], [t], 8)['f1'] == 1

# ---- pixels

def probabilities(seed, n=5):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        hw = tuple(rng.integers(5, 40, 2))
        m = rng.random(hw) < rng.uniform(.02, .3)
        yield m, np.clip(.6*m + rng.normal(.2, .25, hw), 0, 1).astype(np.float32)

def pooled(pictures): return tuple(np.concatenate([o[i].ravel() for o in pictures]) for i in range(2))

@pytest.mark.parametrize('threshold', [.5, .35, .1, .999, 0])
def test_pixel_table_equals_scikit_learn(threshold):
    s, pictures = ev.PixelScores(threshold), list(probabilities(0))
    for m, p in pictures: s.add(m, p)
    t, p = pooled(pictures)
    d = metrics.classification_report(t, p >= np.float32(threshold), output_dict=True, zero_division=0)
    table, names = s.table(), dict(background='False', human='True', macro='macro avg', weighted='weighted avg')
    for ours, theirs in names.items():
        for k, v in dict(precision='precision', recall='recall', f1='f1-score').items():
            assert table[ours][k] == pytest.approx(d[theirs][v])
    assert table['accuracy'] == pytest.approx(d['accuracy']) and table['human']['support'] == t.sum()
    true, soft, hard = np.array([(m.mean(), p.mean(), (p >= np.float32(threshold)).mean()) for m, p in pictures]).T
    assert table['density_r2'] == pytest.approx(metrics.r2_score(true, soft), rel=1e-5)
    assert table['density_r2_hard'] == pytest.approx(metrics.r2_score(true, hard))

def test_any_threshold_from_one_pass():
    s, pictures = ev.PixelScores(.5), list(probabilities(1))
    for m, p in pictures: s.add(m, p)
    for k in (0, 1, 100, 511, 512, 513, 1000, 1023, 1024):
        direct = ev.PixelScores(k/1024)
        for m, p in pictures: direct.add(m, p)
        assert s.confusion(k/1024) == direct.confusion() == direct.confusion(k/1024)
    assert s.confusion(1.5)[:2] == (0, 0)

def test_curve_equals_scikit_learn():
    s, pictures = ev.PixelScores(), [(m, np.floor(p*1024)/np.float32(1024)) for m, p in probabilities(2)]
    for m, p in pictures: s.add(m, p)
    at, precision, recall, f1 = s.curve()
    p0, r0, t0 = metrics.precision_recall_curve(*pooled(pictures))
    index = (t0*1024).astype(int)
    np.testing.assert_allclose(precision[index], p0[:-1])
    np.testing.assert_allclose(recall[index], r0[:-1])
    np.testing.assert_allclose(f1, 2*precision*recall/np.maximum(precision + recall, 1e-12), atol=1e-9)

def test_hard_masks_and_no_pictures():
    m = np.eye(8, dtype=bool)
    assert ev.PixelScores().add(m, m).table()['human']['f1'] == 1
    t = ev.PixelScores().table()
    assert t['human'] == dict(precision=0, recall=0, f1=0, support=0) and 'density_r2' not in t
    one = ev.PixelScores().add(m, m*.9).table()
    assert math.isnan(one['density_r2']) and ev.jsonable(one)['density_r2'] is None

@pytest.mark.parametrize('value', [np.nan, 1.01, -1e-3, np.inf])
def test_what_is_no_probability(value):
    m = np.zeros((4, 4), bool)
    with pytest.raises(DataError, match='0 to 1'): ev.PixelScores().add(m, np.full((4, 4), value))
    with pytest.raises(DataError, match='shape'): ev.PixelScores().add(m, np.zeros((4, 5)))
    with pytest.raises(DataError, match='at least one pixel'): ev.PixelScores().add(np.zeros((0, 4)), np.zeros((0, 4)))

def test_baselines_equal_their_maps():
    s, nobody, everybody = (ev.PixelScores(.5) for _ in range(3))
    for m, p in probabilities(3):
        for o, q in (s, p), (nobody, 0*p), (everybody, 0*p + 1): o.add(m, q)
    b = ev.pixel_baselines(s)
    for k, o in ('all_background', nobody), ('all_human', everybody):
        t = o.table()
        assert b[k]['density_r2'] == 0 and set(b[k]) == set(t)
        for key in set(t) - {'density_r2', 'density_corr2'}: assert b[k][key] == t[key], (k, key)

# ---- the choice of a threshold

def noisy(seed, signal, n=6):
    rng, s = np.random.default_rng(seed), ev.PixelScores()
    for _ in range(n):
        m = rng.random((60, 60)) < .1
        s.add(m, 1/(1 + np.exp(-(signal*m - signal/2 + rng.normal(0, 1, m.shape)))))
    return s

def test_threshold_meets_both_goals_with_room_where_it_can():
    parts = {'A': noisy(0, 5), 'B': noisy(1, 4.5)}
    at = ev.choose_threshold(parts)
    human = lambda o, t: ev.pixel_table(*o.confusion(t))['human']
    room = lambda t: min(min(human(o, t)['precision'] - .65, human(o, t)['recall'] - .8) for o in parts.values())
    assert room(at) > 0 and room(at) == pytest.approx(max(room(k/1024) for k in range(0, 1025, 3)), abs=2e-3)
    assert (at*1024).is_integer()

def test_threshold_otherwise_serves_the_worst_part():
    parts = [noisy(2, 2.2), noisy(3, 1.5)]
    worst = lambda t: min(ev.pixel_table(*o.confusion(t))['human']['f1'] for o in parts)
    assert worst(ev.choose_threshold(parts)) == pytest.approx(max(worst(k/1024) for k in range(1025)), abs=1e-9)
    single = ev.choose_threshold(parts[1])
    assert parts[1].table(single)['human']['f1'] == pytest.approx(parts[1].curve()[3].max())
    assert ev.choose_threshold(parts) == ev.choose_threshold(dict(enumerate(parts)))

def test_threshold_of_a_perfect_model_is_in_the_middle():
    m = np.eye(8, dtype=bool)
    assert ev.choose_threshold(ev.PixelScores().add(m, .25 + .5*m)) == pytest.approx(.5, abs=.01)

empty_street = ev.PixelScores().add(np.zeros((3, 3), bool), np.zeros((3, 3)))

@pytest.mark.parametrize('scores', [[], {}, ev.PixelScores(), [empty_street]])
def test_threshold_without_humans(scores):
    with pytest.raises(DataError, match='human pixels'): ev.choose_threshold(scores)

# ---- shares

def test_shares_equal_scikit_learn_and_the_line_numpy():
    rng = np.random.default_rng(0)
    t = rng.random(40)*.3
    p = .3 + .5*t + rng.normal(0, .01, 40)
    c = ev.calibrate_share(t, p)
    slope, intercept = np.polyfit(p, t, 1)
    assert (c['slope'], c['intercept']) == (pytest.approx(slope), pytest.approx(intercept))
    s, line = ev.share_scores(t, ev.apply_share(p, c), hard=p), np.clip(slope*p + intercept, 0, 1)
    assert s['r2'] == pytest.approx(metrics.r2_score(t, line)) and s['r2_hard'] == pytest.approx(metrics.r2_score(t, p))
    assert s['corr2'] == pytest.approx(np.corrcoef(t, line)[0, 1]**2)

def test_shares_that_say_nothing():
    assert ev.calibrate_share([.1, .2], [.3, .3]) == ev.calibrate_share([], []) == dict(slope=1, intercept=0)
    assert math.isnan(ev.share_scores([.1], [.1])['r2']) and math.isnan(ev.share_scores([.1, .2], [.3, .3])['corr2'])
    assert ev.apply_share([-1, 2], dict(slope=1, intercept=0)).tolist() == [0, 1]

# ---- heatmaps

def test_heatmap_scores_equal_loops_streamed_or_not():
    rng = np.random.default_rng(0)
    y, p = rng.gamma(.2, 1, (5, 9, 7)), rng.gamma(.2, 1, (5, 9, 7))
    e = list(zip(y.ravel().tolist(), p.ravel().tolist()))
    absolute, square, n = sum(abs(a - b) for a, b in e), sum((a - b)**2 for a, b in e), len(e)
    of_zero = sum(a for a, _ in e), sum(a*a for a, _ in e)
    slow = dict(mae=absolute/n, mse=square/n, mspe=square/of_zero[1], mae_ratio=absolute/of_zero[0])
    s = ev.HeatmapScores()
    for a, b in zip(y, p): s.add(a, b)
    for found in (s.scores(), ev.heatmap_scores(y, p)): assert found == {k: pytest.approx(v) for k, v in slow.items()}
    assert s.zero() == {k: pytest.approx(v) for k, v in ev.heatmap_scores(y, 0*y).items()} and s.zero()['mspe'] == 1

def test_heatmaps_of_nothing():
    assert all(math.isnan(v) for v in ev.HeatmapScores().scores().values())
    s = ev.heatmap_scores(np.zeros((2, 2)), np.ones((2, 2)))
    assert s['mae'] == 1 and math.isnan(s['mspe']) and ev.jsonable(s)['mspe'] is None
    with pytest.raises(DataError, match='finite'): ev.heatmap_scores([1.], [np.nan])
    with pytest.raises(DataError, match='shape'): ev.heatmap_scores([1.], [1., 2.])

# ---- bootstrap

def test_bootstrap_covers_and_groups_widen_it():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 10)
    values = rng.normal(0, 1, 40)[groups] + rng.normal(0, .1, 400)
    low, high = ev.bootstrap(values, groups, np.mean)
    alone = ev.bootstrap(values, range(400), np.mean)
    assert low < values.mean() < high and high - low > 2*(alone[1] - alone[0])
    means = np.array([values[groups == g].mean() for g in range(40)])
    assert (high - low) == pytest.approx(2*1.96*means.std()/40**.5, rel=.15)
    a, b = (ev.bootstrap(values, g, np.mean, n=50, seed=1) for g in (groups, [str(g) for g in groups]))
    assert a == b
    narrow = ev.bootstrap(values, groups, np.mean, level=.5)
    assert low < narrow[0] < narrow[1] < high

def test_bootstrap_at_its_ends():
    assert all(math.isnan(v) for v in ev.bootstrap([], [], np.mean))
    assert all(math.isnan(v) for v in ev.bootstrap([1., 2.], 'ab', lambda v: math.nan, n=5))
    assert ev.bootstrap([1., 3.], ['a', 'a'], np.mean, n=5) == (2, 2)
    rows = ev.bootstrap(np.ones((4, 3, 2)), [None]*4, lambda v: v.shape[0]*v.shape[2], n=5)
    assert rows == (8, 8)
    with pytest.raises(DataError, match='groups'): ev.bootstrap([1.], [], np.mean)

# ---- JSON

def test_jsonable_is_strict_json():
    o = [np.float32('nan'), np.int64(3), (np.inf, None, True), np.eye(2), {4: 'text'}, np.bool_(False), Path('x/y')]
    plain = [None, 3, [None, None, True], [[1, 0], [0, 1]], {'4': 'text'}, False, 'x/y']
    assert json.loads(json.dumps(ev.jsonable(o), allow_nan=False)) == plain

# ---- figures

rgb = np.zeros((20, 30, 3), np.uint8)
def figures():
    "Every figure, also of nothing"
    yield ev.scatter([1, 2, 3], [1, 2, 4], low=[0, 1, 3], high=[2, 3, 5])
    for draw in (ev.scatter, ev.residuals):
        for values in ([1, 2], [0, 0], []): yield draw(values, values)
    yield ev.curves({'training': [1, .5, math.nan], 'validation': [None, 1.]}, best=1)
    yield ev.curves({})
    yield ev.pr_curve({'A': noisy(0, 3), 'B': noisy(1, 2)}, .4)
    yield ev.pr_curve(ev.PixelScores())
    yield ev.triptych([[np.eye(20), np.eye(20) > 0, rgb]]*2, what='heat', captions=['a', '$_$'])
    yield ev.triptych([[rgb, rgb]], ('a', 'b'))
    yield ev.worst_best([1, 2, 3], [1, 5, 3.5], lambda i: rgb, names=['a', 'b', 'ç $x_$'], n=9)

def test_figures_are_pngs():
    for fig in figures(): assert isinstance(fig, Figure) and ev.png(fig, 50)[:8] == b'\x89PNG\r\n\x1a\n'

def test_figures_leave_pyplot_alone():
    "No pyplot, no torch: the room starts light and nothing piles up"
    code = ('import sys, crowd_density.evaluation as ev; ev.png(ev.scatter([1, 2], [1, 3])); '
            'print([m for m in ("matplotlib.pyplot", "torch", "torchvision", "fastai", "timm") if m in sys.modules])')
    r = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert r.stdout.strip() == '[]', r.stdout + r.stderr

def test_worst_best_asks_for_what_it_shows():
    asked = []
    ev.worst_best(range(100), np.arange(100) + np.arange(100)[::-1], lambda i: (asked.append(i), rgb)[1], n=2)
    assert asked == [0, 1, 99, 98]
