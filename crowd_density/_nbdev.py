"`nbdev_test`, `nbdev_export` and `nbdev_clean` as people type them: nbdev 3 spells its own commands with a hyphen"
import sys

__all__ = ['nbdev_test', 'nbdev_export', 'nbdev_clean']

_homes = dict(nbdev_test='nbdev.test', nbdev_export='nbdev.doclinks', nbdev_clean='nbdev.clean')

def _run(name):
    "Call nbdev's `name` as its own console script does: it reads `sys.argv` only where a file run as `__main__` calls it"
    try: __import__(_homes[name])
    except ModuleNotFoundError as e:
        if (e.name or '').split('.')[0] != 'nbdev': raise
        print(f"{name}: nbdev is not installed; get it with: pip install 'crowd-density[dev]'", file=sys.stderr)
        sys.exit(2)
    code = compile(f'from {_homes[name]} import {name}\n{name}()', __file__, 'exec')
    exec(code, {'__name__': '__main__', '__file__': __file__})

def nbdev_test(): _run('nbdev_test')
def nbdev_export(): _run('nbdev_export')
def nbdev_clean(): _run('nbdev_clean')
