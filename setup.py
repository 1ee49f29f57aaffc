"The package's metadata comes from `settings.ini`, its build system and nbdev's settings from `pyproject.toml`"
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

def lines(key): return cfg[key].strip().splitlines()

statuses = {'1': 'Planning', '2': 'Pre-Alpha', '3': 'Alpha', '4': 'Beta', '5': 'Production/Stable'}
classifiers = [f"Development Status :: {cfg['status']} - {statuses[cfg['status']]}", 'Intended Audience :: Developers',
    'Intended Audience :: Science/Research', f"Natural Language :: {cfg['language']}", 'Programming Language :: Python :: 3',
    *[f'Programming Language :: Python :: 3.{n}' for n in (11, 12, 13)], 'Topic :: Scientific/Engineering :: Image Recognition']
about = {o: cfg[o] for o in ('version', 'description', 'author', 'author_email')} | dict(name=cfg['lib_name'],
    keywords=cfg['keywords'].split(), classifiers=classifiers, url=cfg['git_url'],
    project_urls=dict(Repository=cfg['git_url'], Issues=f"{cfg['git_url']}/issues"))
texts = dict(long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    license_expression=cfg['license'], license_files=cfg['license_files'].split())
needs = dict(python_requires=f">={cfg['min_python']}", install_requires=lines('requirements') + lines('learn_requirements'),
    extras_require=dict(dev=lines('dev_requirements'), distributed=lines('distributed_requirements')))
packages = find_namespace_packages(include=[cfg['lib_path'], f"{cfg['lib_path']}.*"], exclude=['*__pycache__*'])
setup(**about, **texts, **needs, packages=packages, include_package_data=True,
    entry_points=dict(console_scripts=lines('console_scripts')))
