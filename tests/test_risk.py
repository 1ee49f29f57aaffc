"The state machine of a zone: random histories against a slow oracle, and the laws that must hold in each of them"
import json, os, subprocess, sys

import numpy as np, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from crowd_density.ground import Level, Levels, Reading, parse_site
from crowd_density.risk import LEVELS, RAISED, UNKNOWN, Event, ZoneRisk, default_levels, in_words, iso, level_of, slope

STALE, COOL, SOURCE, WIDE = 5., 60., 10., .1
ROOT = __file__.rsplit('/', 2)[0]
rank = ('unknown', *LEVELS).index

def reading(t, d, reason=None, wide=WIDE):
    if d is None: return Reading('gate', 'square', t, reason=reason or 'the picture is black')
    return Reading('gate', 'square', t, d, d*(1-wide), d*(1+wide), d*1.4, d*30)

def machine(**kw): return ZoneRisk('gate', 'square', stale_after=STALE, cooldown=COOL, source_cooldown=SOURCE, **kw)

def feed(risk, history):
    "Events of `[(time, density or None), …]`"
    return [e for t, d in history for e in risk.step(reading(t, d))]

# a slow oracle: from the whole history, by the definitions

def run_back(good, k, keep):
    "Seconds over which all readings up to the k-th kept `keep`, without a gap of `STALE`; None if it does not itself"
    if not keep(good[k][1]): return None
    i = k
    while i and keep(good[i-1][1]) and good[i][0]-good[i-1][0] < STALE: i -= 1
    return good[k][0]-good[i][0]

def latched(good, level):
    "Is the latch of `level` on, after each good reading?"
    out = [False]
    for k, (t, d) in enumerate(good):
        on, gap = out[-1], t-good[k-1][0] if k else np.inf
        if on and gap >= STALE and d < level.leave and gap >= level.hold: on = False
        above, below = run_back(good, k, lambda x: x >= level.enter), run_back(good, k, lambda x: x < level.leave)
        if above is not None and above >= level.for_: on = True
        elif on and below is not None and below >= level.hold: on = False
        out.append(on)
    return out[1:]

def oracle(history, levels):
    "The level after `[(time, density or None), …]`"
    good, known, last = [h for h in history if h[1] is not None], False, None
    on, k = {l: latched(good, getattr(levels, l)) for l in RAISED}, -1
    for t, d in history:
        if last is not None and t-last >= STALE: known = False
        if d is None: continue
        k, last = k+1, t
        calm = d < levels.busy.enter and (d*(1+WIDE) < levels.busy.enter or run_back(good, k, lambda x: x < levels.busy.enter) >= levels.busy.for_)
        known = known or calm or any(on[l][k] for l in RAISED)
    return next((l for l in reversed(RAISED) if on[l][k]), 'clear') if known else UNKNOWN

densities = st.sampled_from([0., 1., 1.59, 1.6, 1.9, 2., 2.5, 3.1, 3.2, 3.9, 4., 4.6, 5., 6., 8.])
steps = st.sampled_from([.5, 1., 1., 1., 2., 4.5, 5., 12., 30.])

@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(steps, st.none() | densities), min_size=1, max_size=40))
def test_level_is_the_oracles(moves):
    risk, t, history = machine(), 0., []
    for dt, d in moves:
        t += dt
        history.append((t, d))
        risk.step(reading(t, d))
        assert risk.level == oracle(history, default_levels()), history

class Watched(RuleBasedStateMachine):
    "Random lives of a zone; each law is an invariant"
    def __init__(self):
        super().__init__()
        self.risk, self.t, self.history, self.events, self.levels, self.shadow = machine(), 0., [], [], [], machine()

    def after(self, new, shadow):
        assert [e.to_json() for e in new] == [e.to_json() for e in shadow]
        self.events += [(self.t, e) for e in new]
        self.levels.append((self.t, self.risk.level))

    @rule(dt=steps, d=densities, n=st.integers(1, 12))
    def stays(self, dt, d, n):
        for _ in range(n):
            self.t += dt
            before, seen = self.risk.level, [h for h in self.history if h[1] is not None]
            if seen and self.t-seen[-1][0] >= STALE: self.levels.append((self.t, UNKNOWN))
            self.history.append((self.t, d))
            self.after(self.risk.step(reading(self.t, d)), self.shadow.step(reading(self.t, d)))
            if before == UNKNOWN and self.risk.level == 'clear': assert d < default_levels().busy.enter
        self.check()

    @rule(dt=steps, reason=st.sampled_from(['the picture is black', 'frozen', 'no connection']))
    def blind(self, dt, reason):
        self.t += dt
        self.history.append((self.t, None))
        self.after(self.risk.step(reading(self.t, None, reason)), self.shadow.step(reading(self.t, None, reason)))
        self.check()

    @rule(dt=steps)
    def waits(self, dt):
        self.t += dt
        self.history.append((self.t, None))
        self.after(self.risk.tick(self.t), self.shadow.tick(self.t))
        self.check()

    @rule()
    def restarts(self): self.risk = machine().restore(json.loads(json.dumps(self.risk.state())))

    def check(self):
        good = [(t, d) for t, d in self.history if d is not None]
        level = self.risk.level
        assert level == oracle(self.history, default_levels())
        if not good or self.t-good[-1][0] >= STALE: assert level == UNKNOWN and self.risk.reason
        for l in RAISED: # no sustained crossing is missed
            rule = getattr(default_levels(), l)
            above = level != UNKNOWN and run_back(good, len(good)-1, lambda x: x >= rule.enter)
            if above and above >= rule.for_: assert rank(level) >= rank(l)

    @invariant()
    def says_nothing_twice(self):
        last = {}
        for t, e in self.events:
            wait = SOURCE if e.kind == 'source' else COOL
            assert t-last.get((e.kind, e.level), -np.inf) >= wait, (t, e)
            last[e.kind, e.level] = t

    @invariant()
    def events_are_a_chain(self):
        assert len({e.id for _, e in self.events}) == len(self.events)
        previous = UNKNOWN
        for _, e in self.events:
            assert e.previous == previous
            if e.kind in ('level', 'source') and e is not self.events[0][1]: assert e.level != previous
            assert (e.density is None) == (e.level == UNKNOWN) and e.reason
            previous = e.level

    @invariant()
    def what_lasts_is_told(self):
        "A level that lasted longer than every cool-down is what the receivers know"
        if not self.levels or not self.events: return
        same = self.t
        for t, l in reversed(self.levels):
            if l != self.risk.level: break
            same = t
        recent = [t for t, _ in self.levels if t > same]
        if self.t-same > COOL+SOURCE and len(recent) > 1: assert self.events[-1][1].level == self.risk.level

def test_random_lives():
    run_state_machine_as_test(Watched, settings=settings(max_examples=60, stateful_step_count=25, deadline=None,
        suppress_health_check=list(HealthCheck)))

@pytest.mark.slow
def test_many_random_lives():
    run_state_machine_as_test(Watched, settings=settings(max_examples=1500, stateful_step_count=40, deadline=None,
        suppress_health_check=list(HealthCheck)))

# by example

def test_one_failed_picture_does_not_start_anew():
    risk = machine()
    feed(risk, [(t, 1.) for t in range(3)])
    got = feed(risk, [(3, 6.), (4, 6.), (5, None), (6, 6.)])
    assert [(e.kind, e.level) for e in got] == [('level', 'critical')]

def test_a_gap_of_stale_after_starts_anew():
    risk = machine()
    feed(risk, [(t, 1.) for t in range(3)] + [(3, 6.), (4, 6.)])
    assert [e.level for e in feed(risk, [(10, 6.)])] == [UNKNOWN] and risk.level == UNKNOWN
    assert [e.level for e in feed(risk, [(11, 6.), (12, 6.), (13, 6.)])] == ['critical']

def test_entering_again_within_the_cooldown_is_told_at_once():
    risk = machine(levels=Levels(critical=Level(enter=5, leave=4, for_=1, hold=2)))
    feed(risk, [(t, 1.) for t in range(3)])
    got = feed(risk, [(3+t, d) for t, d in enumerate([6.]*12 + [3.5]*4 + [6.]*3)])
    kinds = [(e.kind, e.level) for e in got if e.kind != 'trend']
    assert kinds == [('level', 'critical'), ('level', 'crowded'), ('repeat', 'critical')]

def test_short_loss_keeps_the_level_and_long_loss_judges_anew():
    for gap, level in ((8, 'critical'), (40, 'busy')):
        risk = machine()
        feed(risk, [(t, 6.) for t in range(10)])
        feed(risk, [(9+gap, 2.5)])
        assert risk.level == level, gap

def test_one_doubtful_picture_does_not_say_clear():
    for judge, d in (('density', 1.5), ('worst_patch', 1.1)): # their intervals reach to 2.4
        risk = machine(judge=judge)
        feed(risk, [(t, 6.) for t in range(10)])
        for t in range(10, 50): risk.tick(t)
        told = [(e.level, e.reason) for t in range(50, 57) for e in risk.step(reading(t, d, wide=.6))]
        assert told == [('clear', 'pictures again: clear, busy possible')] and risk.state()['said']['source clear'] == 55
        feed(risk, [(t, None) for t in range(57, 70)])
        assert risk.level == UNKNOWN
        feed(risk, [(70, .5)])
        assert risk.level == 'clear' # one that leaves no doubt

def test_doubt_lasts_while_readings_go_above():
    risk = machine()
    feed(risk, [(t, d) for t, d in enumerate([1.9] + [3.]*4 + [1.9])])
    assert risk.level == UNKNOWN
    feed(risk, [(6+t, d) for t, d in enumerate([2.1, 1.9]*10)])
    assert risk.level == UNKNOWN
    feed(risk, [(26+t, 1.9) for t in range(5)])
    assert risk.level == 'clear'

@pytest.mark.parametrize('seconds, level', [(0, UNKNOWN), (4, UNKNOWN), (5, 'clear')])
def test_without_an_interval_one_picture_is_not_sure(seconds, level):
    risk = machine()
    for t in range(seconds+1): risk.step(Reading('gate', 'square', t, 1., None, None, 1., 30))
    assert risk.level == level

def test_doubt_ends_also_where_for_is_longer_than_a_trend():
    risk = machine(levels=Levels(busy=Level(enter=2, leave=1.6, for_=120, hold=1)))
    feed(risk, [(t, 1.9) for t in range(120)])
    assert risk.level == UNKNOWN
    feed(risk, [(120, 1.9)])
    assert risk.level == 'clear'

@pytest.mark.parametrize('before, after', [(6., 1.), (1., 1.), (6., 6.), (2.5, 2.5)])
def test_loss_and_return_are_told(before, after):
    risk = machine()
    feed(risk, [(t, before) for t in range(30)])
    lost = [e for t in range(30, 60) for e in risk.tick(t)]
    assert [(e.kind, e.level, e.time) for e in lost] == [('source', UNKNOWN, iso(34))] and '5 s' in lost[0].reason
    back = feed(risk, [(60+t, after) for t in range(3)])
    assert [(e.kind, e.previous) for e in back] == [('source', UNKNOWN)]
    assert back[0].level == level_of(after, default_levels())

def test_new_danger_after_a_loss_is_no_source_event():
    risk = machine()
    feed(risk, [(t, 1.) for t in range(10)])
    for t in range(10, 30): risk.tick(t)
    got = feed(risk, [(30+t, 6.) for t in range(5)])
    assert [(e.kind, e.level, e.previous) for e in got] == [('level', 'critical', UNKNOWN)]

def test_no_picture_at_all_is_told_once_and_then_repeated():
    risk = machine()
    got = [e for t in range(130) for e in risk.tick(t)]
    assert {(e.camera, e.zone, e.level) for e in got} == {('gate', 'square', UNKNOWN)}
    assert [(e.kind, e.time) for e in got] == [('source', iso(5)), ('repeat', iso(65)), ('repeat', iso(125))]

def test_reminders_while_critical():
    got = feed(machine(), [(t, 6.) for t in range(200)])
    kinds = [(e.kind, e.time) for e in got if e.level == 'critical']
    assert kinds == [('level', iso(3)), ('repeat', iso(63)), ('repeat', iso(123)), ('repeat', iso(183))]

def test_worst_patch_may_be_judged():
    by_mean, by_patch = machine(), machine(judge='worst_patch')
    for r in (by_mean, by_patch): feed(r, [(t, 3.6) for t in range(20)])
    assert (by_mean.level, by_patch.level) == ('busy', 'critical')
    assert by_patch.words() == 'critical, perhaps only crowded'

def test_not_a_number_is_no_reading():
    risk = machine()
    feed(risk, [(0, 1.), (1, float('nan')), (2, float('inf')), (6, float('nan'))])
    assert risk.level == UNKNOWN and 'no number' in risk.reason

@pytest.mark.parametrize('low, high, level, words', [
    (2., 3., 'busy', 'busy'), (1.5, 3., 'busy', 'busy, perhaps only clear'),
    (2., 5.5, 'busy', 'busy, critical possible'),
    (3.5, 5.5, 'crowded', 'crowded, critical possible'), (None, None, 'busy', 'busy'), (0., 9., UNKNOWN, UNKNOWN),
    (4., 9., 'critical', 'critical, perhaps only crowded')])
def test_in_words(low, high, level, words): assert in_words(level, low, high, default_levels()) == words

def test_trend_is_not_noise():
    rng, risk = np.random.default_rng(0), machine()
    feed(risk, [(t, 3+rng.normal(0, .2)) for t in range(60)])
    assert abs(risk.trend().per_minute) < .3
    quick = machine()
    feed(quick, [(t, 2.2+t/40) for t in range(40)])
    assert quick.trend().to == 'crowded' and quick.trend().seconds == pytest.approx((4-2.2)*40-39, abs=2)
    assert machine().trend().to is None

@given(st.lists(st.floats(0, 9), min_size=3, max_size=30))
def test_slope_is_polyfits(d):
    t = np.arange(len(d))
    assert slope(t, d)[0] == pytest.approx(np.polyfit(t, d, 1)[0], abs=1e-9)

@given(st.floats(0, 4e9))
def test_iso(t):
    text = iso(t)
    assert len(text) == 24 and text.endswith('Z')

def test_events_travel_as_json():
    e = feed(machine(), [(t, 6.) for t in range(10)])[0]
    d = json.loads(e.to_json())
    assert list(d) == 'id time camera zone kind level previous density low high worst_patch count reason'.split()
    assert Event.from_dict(d) == e

def test_same_ids_in_another_process():
    code = """if True:
        from crowd_density.risk import Reading, ZoneRisk
        r = ZoneRisk('gate', 'square')
        print([e.id for t in range(20) for e in r.step(Reading('gate', 'square', t, 6., 5., 7., 8., 90.))])"""
    def run(seed):
        env = dict(os.environ, PYTHONHASHSEED=seed)
        return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, env=env).stdout
    a, b = run('1'), run('2')
    assert a == b and len(a) > 20

_own = dict(camera='gate', zone='square', version=1)

@pytest.mark.parametrize('broken', [{}, dict(_own, zone='other'), dict(_own, version=2), _own])
def test_restore_refuses_what_is_not_its_own(broken):
    risk = machine()
    with pytest.raises(ValueError, match='state'): risk.restore(broken)
    assert risk.level == UNKNOWN and feed(risk, [(0, 1.)])

def test_a_state_of_before_is_taken_up():
    risk = machine()
    feed(risk, [(t, 6.) for t in range(10)])
    state = risk.state()
    del state['back']
    assert machine().restore(state).level == 'critical'

def test_of_a_site():
    site = parse_site('''[[camera]]
name = "gate"
source = "a.mp4"
stale_after = 7
[camera.ground]
rectangle_px = [[100, 400], [500, 400], [400, 200], [200, 200]]
rectangle_m = [4, 8]
[[camera.zone]]
name = "stairs"
judge = "worst_patch"
polygon_px = [[100, 400], [500, 400], [400, 200], [200, 200]]
[camera.zone.levels]
busy = {enter = 1, leave = 0.5, for = 0, hold = 0}
''')
    risk = ZoneRisk.of(site.cameras[0], site.cameras[0].zones[0], cooldown=30)
    assert (risk.stale_after, risk.cooldown, risk.judge, risk.levels.busy.enter) == (7, 30, 'worst_patch', 1)
    assert [e.level for e in risk.step(reading(0, 1.2))] == ['busy']
