"""What a server tells of itself, read with care: some of it is its operator's, not ours."""

from trajstore.log.wire import info_fields


def test_path_that_is_no_unicode_hides_nothing_else_that_a_server_tells():
    told = info_fields(b"# Server\r\nconfig_file:/etc/r\xe9dis.conf\r\nrun_id:ab12\r\n")
    assert told["run_id"] == "ab12"
