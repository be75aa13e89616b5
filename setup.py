"The package's metadata is settings.ini; this file hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
low, high = (tuple(map(int, cfg[key].split("."))) for key in ("min_python", "max_python"))
extras = {key.removesuffix("_requirements"): cfg[key].split() for key in cfg
          if key.endswith("_requirements")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']},<{high[0]}.{high[1] + 1}",
    classifiers=["Development Status :: 3 - Alpha",
                 "Intended Audience :: Science/Research",
                 "Natural Language :: English",
                 *(f"Programming Language :: Python :: {low[0]}.{minor}"
                   for minor in range(low[1], high[1] + 1))],
    packages=find_packages(include=["medkd", "medkd.*"]),
    include_package_data=True,
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": ["medkd=medkd.__main__:main"]},
    zip_safe=False,
)
