"""Install vision_course; every setting stands in settings.ini."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
extras = {
    key.removesuffix("_requirements"): shlex.split(value)
    for key, value in settings.items()
    if key.endswith("_requirements")
}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="MIT",
    keywords=settings["keywords"].split(),
    classifiers=["Framework :: Jupyter", "Intended Audience :: Education", "Programming Language :: Python :: 3"],
    packages=["vision_course", "vision_course.assets"],
    package_dir={"": "."},
    package_data={"vision_course.assets": ["*"]},
    python_requires=">=" + settings["min_python"],
    install_requires=shlex.split(settings["requirements"]),
    extras_require=extras,
    entry_points={"console_scripts": shlex.split(settings["console_scripts"])},
    zip_safe=False,
)
