"""Commands keep what JAX compiles for the next one, unless they are told not to."""

from tvjax.cli.main import keep_programs, run


def test_programs_are_kept_by_machine_and_up_to_a_size(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    keep_programs(["evaluate"], environment)
    folder = environment["JAX_COMPILATION_CACHE_DIR"]
    assert folder.startswith(str(tmp_path / "tvjax" / "programs")) and not (tmp_path / "tvjax").exists()
    assert environment["JAX_COMPILATION_CACHE_MAX_SIZE"] == str(2**30)


def test_a_flag_and_the_setting_of_jax_itself_come_first(tmp_path):
    for arguments, environment in (
        (["demo", "--no-cache"], {}),
        (["demo"], {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}),
    ):
        before = dict(environment)
        keep_programs(arguments, environment)
        assert environment == before


def test_the_flag_stands_anywhere(capsys):
    assert run(["inspect", "nowhere", "--no-cache"]) == 2
    assert "nowhere" in capsys.readouterr().err
