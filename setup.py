"Build script: every fact comes from `settings.ini`, so notebooks, docs and PyPI agree."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(ROOT / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]


def words(key): return cfg.get(key, "").split()


def readme():
    "README.md with full addresses: PyPI shows it too, and has no clone."
    path = ROOT / "README.md"
    if not path.exists(): return ""
    raw = cfg["git_url"].replace("github.com", "raw.githubusercontent.com")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\1{raw}/{cfg['branch']}/", path.read_text("utf-8"))
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)", rf"\1{cfg['git_url']}/blob/{cfg['branch']}/", text)


setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], url=cfg["git_url"],
    author=cfg["author"], author_email=cfg["author_email"], keywords=cfg["keywords"], license="Apache-2.0",
    long_description=readme(), long_description_content_type="text/markdown",
    project_urls={"Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md"},
    packages=find_packages(include=["llm_quantize", "llm_quantize.*"]), python_requires=">=" + cfg["min_python"],
    package_data={"llm_quantize": ["py.typed", "data/**/*"]},
    install_requires=words("requirements"),
    extras_require={"widgets": words("widget_requirements"),
                    "dev": words("dev_requirements") + words("widget_requirements")},
    entry_points={"console_scripts": [line for line in cfg.get("console_scripts", "").split("\n") if line.strip()],
                  "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
