"Build script: every fact comes from `settings.ini`, so notebooks, docs and PyPI agree."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="], interpolation=None); ini.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = ini["DEFAULT"]
words = lambda k: cfg.get(k, "").split()
readme = Path(__file__).with_name("README.md").read_text("utf-8") if Path(__file__).with_name("README.md").exists() else ""
readme = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\1{cfg['git_url'].replace('github.com', 'raw.githubusercontent.com')}/{cfg['branch']}/", readme) # PyPI shows it too, and has no clone
readme = re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)", rf"\1{cfg['git_url']}/blob/{cfg['branch']}/", readme)
setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], url=cfg["git_url"],
    author=cfg["author"], author_email=cfg["author_email"], keywords=cfg["keywords"], license="Apache-2.0",
    long_description=readme,
    long_description_content_type="text/markdown",
    package_data={"llm_quantize": ["py.typed", "data/**/*"]},
    packages=find_packages(include=["llm_quantize", "llm_quantize.*"]), python_requires=">=" + cfg["min_python"],
    install_requires=words("requirements"),
    extras_require={"widgets": words("widget_requirements"), "dev": words("dev_requirements") + words("widget_requirements")},
    entry_points={"console_scripts": [s for s in cfg.get("console_scripts", "").split("\n") if s.strip()],
                  "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)
