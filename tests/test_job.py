"""What every job does around its stage."""

from recsys_dist import job


def test_an_interrupted_job_says_that_it_can_go_on(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert job.guard(interrupt) == 130
    assert "the same command goes on" in capsys.readouterr().err
