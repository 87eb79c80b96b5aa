"""`edt` as a process that does Ray's calls itself: a test can kill it, and it costs no Ray session."""

from pipelines.cli import main
from tests.support.local_ray import local_ray_train

if __name__ == "__main__":
    with local_ray_train():
        main()
