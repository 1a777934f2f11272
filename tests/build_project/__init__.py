"""A stand-in for llama.cpp's repository: CMake builds its ``bin/llama-server`` in a second, and it does what is asked.

``make_repository(path)`` makes a real git repository. Each ``commit(**behaviour)`` writes a whole project; what is not
named is as in a healthy one. Names of ``Behaviour`` change how it is built, names of ``fake_llama_server.Faults`` what
the finished server does::

    repository = make_repository(tmp_path / "llama.cpp")
    good = repository.commit()
    slow = repository.commit(told_decode_tps=50)
    broken = repository.commit(broken_source=True)
"""

from tests.build_project.behaviour import Behaviour
from tests.build_project.repository import Repository, commit_all, git, init, make_repository
from tests.build_project.small_disk import small_disk

__all__ = ["Behaviour", "Repository", "commit_all", "git", "init", "make_repository", "small_disk"]
