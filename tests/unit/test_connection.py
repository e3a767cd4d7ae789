"""Where connection options come from, which place wins, and what a wrong one is told."""

import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme

from bus_kv.runtime.connection import OPTIONS, ConnectionConfigError, ConnectOptions

SEED = "SUAMK2FG4MI6UE3ACF3FK3OIQBCEIEZV7NSWFFEW63UXMRLFM2XLAXK4GY"
CREDS = f"""\
-----BEGIN NATS USER JWT-----
eyJ0.eyJq.c2ln
------END NATS USER JWT------

-----BEGIN USER NKEY SEED-----
{SEED}
------END USER NKEY SEED------
"""
FULL = ConnectOptions(
    servers=("tls://a:4222", "tls://b:4333"),
    root="prod.kv",
    user="node",
    password="p w,=\"'",
    tls_ca=Path("/etc/ca.pem"),
    tls_cert=Path("/etc/cert.pem"),
    tls_key=Path("/etc/key.pem"),
    tls_hostname="nats.example",
    js_domain="hub",
    inbox_prefix="_INBOX_node",
)


def load(
    env: dict[str, str] | None = None, config: Path | None = None, /, **flags: Any
) -> ConnectOptions:
    return ConnectOptions.load(config=config, env=env or {}, flags=flags)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def flags_of(argv: list[str]) -> dict[str, Any]:
    pairs = (flag.removeprefix("--").split("=", 1) for flag in argv)
    return {name.replace("-", "_"): text for name, text in pairs}


class TestPrecedence:
    def test_defaults(self) -> None:
        assert load() == ConnectOptions()
        assert load().servers == ("nats://127.0.0.1:4222",)
        assert (load().root, load().inbox_prefix) == ("bkv", "_INBOX")

    @pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("nats", "password")])
    def test_each_place_is_read_and_the_higher_one_wins(self, name: str, tmp_path: Path) -> None:
        pair = {"tls_cert": "tls_key", "tls_key": "tls_cert", "user": "password"}.get(name)
        config = write(tmp_path / "c.toml", f'{name} = "file"\n' + (f'{pair} = "x"' * bool(pair)))
        env = {f"BUS_KV_{name.upper()}": "env"}

        def seen(*places: Any, **flags: Any) -> str:
            return Path(str(getattr(load(*places, **flags), name))).name

        assert seen({}, config) == "file"
        assert seen(env, config) == "env"
        assert seen(env, config, **{name: "flag"}) == "flag"
        assert seen(env, config, **{name: None}) == "env"

    def test_servers(self, tmp_path: Path) -> None:
        config = write(tmp_path / "c.toml", 'nats = ["nats://a", "b:4333"]')
        env = {"BUS_KV_NATS": "tls://c, d "}
        assert load({}, config).servers == ("nats://a:4222", "nats://b:4333")
        assert load(env, config).servers == ("tls://c:4222", "nats://d:4222")
        assert load(env, config, nats="[::1]:4444").servers == ("nats://[::1]:4444",)
        assert load(nats=("nats://e:1", "f")).servers == ("nats://e:1", "nats://f:4222")

    def test_an_empty_variable_counts_as_not_set(self, tmp_path: Path) -> None:
        config = write(tmp_path / "c.toml", 'root = "file"')
        assert load({"BUS_KV_ROOT": "", "BUS_KV_CONFIG": ""}, config).root == "file"

    def test_the_file_may_be_named_by_the_environment_but_the_flag_wins(
        self, tmp_path: Path
    ) -> None:
        named = write(tmp_path / "env.toml", 'root = "of_env"')
        flagged = write(tmp_path / "flag.toml", 'root = "of_flag"')
        assert load({"BUS_KV_CONFIG": str(named)}).root == "of_env"
        assert load({"BUS_KV_CONFIG": str(named)}, flagged).root == "of_flag"

    def test_the_file_may_use_a_connection_table(self, tmp_path: Path) -> None:
        config = write(tmp_path / "c.toml", 'root = "top"\n[connection]\njs_domain = "hub"')
        assert (load({}, config).root, load({}, config).js_domain) == ("top", "hub")

    def test_paths_in_the_file_start_at_its_folder(self, tmp_path: Path) -> None:
        config = write(tmp_path / "c.toml", 'creds = "node.creds"\ntls_ca = "/etc/ca.pem"')
        assert load({}, config).creds == tmp_path / "node.creds"
        assert load({}, config).tls_ca == Path("/etc/ca.pem")

    def test_home_is_expanded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/ann")
        assert load({"BUS_KV_CREDS": "~/n.creds"}).creds == Path("/home/ann/n.creds")


class TestOneWayToAuthenticate:
    def test_a_higher_place_decides_which(self) -> None:
        env = {"BUS_KV_CREDS": "n.creds", "BUS_KV_PASSWORD": "secret"}
        options = load(env, user="ann")
        assert (options.user, options.password, options.creds) == ("ann", "secret", None)
        options = load({"BUS_KV_USER": "ann", "BUS_KV_PASSWORD": "secret"}, nkey="ann.nk")
        assert (options.user, options.password, options.nkey) == (None, None, Path("ann.nk"))

    def test_user_and_password_may_come_from_two_places(self, tmp_path: Path) -> None:
        config = write(tmp_path / "c.toml", 'user = "ann"')
        options = load({"BUS_KV_PASSWORD": "secret"}, config)
        assert (options.user, options.password) == ("ann", "secret")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"nats": ""}, "nats: the list of servers is empty"),
        ({"nats": " , "}, "nats: the list of servers is empty"),
        ({"nats": 4222}, "nats: must be a URL or a list of URLs, not 4222"),
        ({"nats": "http://host"}, "nats: 'http://host' is no server address: write nats://host"),
        ({"nats": "nats://"}, "is no server address"),
        ({"nats": "nats://host:99999"}, "is no server address"),
        ({"nats": "nats://host:port"}, "is no server address"),
        ({"nats": "host:0"}, "is no server address"),
        ({"nats": "host:"}, "is no server address"),
        ({"nats": "two hosts"}, "is no server address"),
        ({"nats": "nats://host/path"}, "is no server address"),
        ({"root": "a..b"}, "root: 'a..b' must be tokens of letters"),
        ({"root": "bkv.*"}, "root: "),
        ({"root": "x" * 129}, "128 characters at most"),
        ({"inbox_prefix": "_INBOX_client."}, "inbox_prefix: "),
        ({"js_domain": "a b"}, "js_domain: "),
        ({"root": ""}, "root: must be a text that is not empty"),
        ({"root": 7}, "root: must be a text that is not empty"),
        ({"creds": 7}, "creds: must be the path of a file"),
        ({"creds": "a", "user": "ann", "password": "s"}, "creds and user are given together"),
        ({"creds": "a", "nkey": "b"}, "creds and nkey are given together"),
        ({"nkey": "b", "password": "s"}, "nkey and password are given together"),
        ({"user": "ann"}, "user is given without password"),
        ({"password": "s"}, "password is given without user"),
        ({"tls_key": "k"}, "tls_key is given without tls_cert"),
        ({"tls_cert": "c"}, "tls_cert is given without tls_key"),
        ({"color": "red"}, "flags: unknown option 'color'; known are nats, root"),
    ],
)
def test_wrong_options_are_named_in_one_line(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConnectionConfigError) as raised:
        load(**flags)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("root = 'a'\nroot 5", "is not TOML: "),
        ("root = 'a'\nroot 5", "line 2"),
        ("colour = 'red'", "unknown option 'colour'"),
        ("[connection]\nservers = 'a'", "unknown option 'servers'"),
        ("connection = 5", "connection must be a table"),
        ("root = 5", "root: must be a text"),
        ("nats = [4222]", "nats: must be a URL or a list of URLs"),
        ("creds = 5", "creds: must be the path of a file"),
    ],
)
def test_a_wrong_file_is_told_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConnectionConfigError) as raised:
        load({}, write(tmp_path / "c.toml", text))
    assert message in str(raised.value)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConnectionConfigError, match=r"config: there is no file .*none\.toml"):
        load({}, tmp_path / "none.toml")
    with pytest.raises(ConnectionConfigError, match=r"config: cannot read .*: Is a directory"):
        load({}, tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConnectionConfigError, match="is not a text file"):
        load({}, tmp_path / "bytes.toml")


class TestPasswordsStayHidden:
    def test_not_in_repr_messages_or_arguments(self) -> None:
        with_url = ConnectOptions(servers=("nats://ann:hunter2@host",))
        with_field = ConnectOptions(user="ann", password="hunter2")
        assert "hunter2" not in repr(with_field)
        assert with_url.addresses == "host:4222"
        assert not [part for part in with_url.argv() + with_field.argv() if "hunter2" in part]

    def test_not_in_the_error_of_a_bad_url(self) -> None:
        with pytest.raises(ConnectionConfigError) as raised:
            load(nats="nats://ann:hunter2@host:port")
        assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        ConnectOptions(),
        FULL,
        ConnectOptions(creds=Path("/n.creds"), root="a.b"),
        ConnectOptions(nkey=Path("/n.nk")),
        ConnectOptions(servers=("nats://ann:hunter2@host",)),
        ConnectOptions(user="-ann", password="-"),
    ],
)
def test_a_child_process_gets_the_same_options_whatever_it_inherits(
    options: ConnectOptions, tmp_path: Path
) -> None:
    config = write(tmp_path / "c.toml", 'js_domain = "other"\ntls_ca = "other.pem"')
    inherited = {f"BUS_KV_{name.upper()}": "other" for name in OPTIONS}
    env = inherited | {"BUS_KV_CONFIG": str(config)} | options.env()
    assert load(env, **flags_of(options.argv())) == options


class TestArgumentsForTheClient:
    def test_plain(self) -> None:
        assert ConnectOptions().nats_kwargs() == {
            "servers": ["nats://127.0.0.1:4222"],
            "inbox_prefix": b"_INBOX",
        }

    def test_user_and_name(self) -> None:
        kwargs = ConnectOptions(user="ann", password="s", name="bus_kv n1").nats_kwargs()
        assert (kwargs["user"], kwargs["password"], kwargs["name"]) == ("ann", "s", "bus_kv n1")

    def test_nkey(self, tmp_path: Path) -> None:
        nkey = write(tmp_path / "n.nk", f"# node\n{SEED}\n")
        assert ConnectOptions(nkey=nkey).nats_kwargs()["nkeys_seed_str"] == SEED

    def test_creds_are_read_again_at_every_connect(self, tmp_path: Path) -> None:
        creds = write(tmp_path / "n.creds", CREDS)
        kwargs = ConnectOptions(creds=creds).nats_kwargs()
        assert kwargs["user_jwt_cb"]() == b"eyJ0.eyJq.c2ln"
        assert kwargs["signature_cb"]("nonce")
        write(creds, CREDS.replace("eyJq", "bmV3"))
        assert kwargs["user_jwt_cb"]() == b"eyJ0.bmV3.c2ln"

    def test_creds_gone_bad_are_an_error_that_reconnecting_survives(self, tmp_path: Path) -> None:
        creds = write(tmp_path / "n.creds", CREDS)
        kwargs = ConnectOptions(creds=creds).nats_kwargs()
        write(creds, "")
        with pytest.raises(OSError, match="holds no NATS user JWT"):
            kwargs["user_jwt_cb"]()
        with pytest.raises(OSError, match="holds no user seed"):
            kwargs["signature_cb"]("nonce")

    def test_tls(self, tmp_path: Path) -> None:
        options = with_certificates(tmp_path)
        kwargs = replace(options, tls_hostname="nats.example").nats_kwargs()
        assert kwargs["tls_hostname"] == "nats.example"
        assert kwargs["tls"].verify_mode is ssl.CERT_REQUIRED
        assert kwargs["tls"].check_hostname

    @pytest.mark.parametrize(
        ("options", "encrypted"),
        [
            (ConnectOptions(), False),
            (ConnectOptions(servers=("nats://a", "tls://b")), True),
            (ConnectOptions(tls_hostname="a"), True),
        ],
    )
    def test_a_tls_url_or_option_asks_for_encryption(
        self, options: ConnectOptions, encrypted: bool
    ) -> None:
        assert options.uses_tls is encrypted
        assert ("tls" in options.nats_kwargs()) is encrypted


class TestFilesAreCheckedBeforeConnecting:
    @pytest.mark.parametrize("name", ["creds", "nkey", "tls_ca"])
    def test_missing(self, name: str, tmp_path: Path) -> None:
        options = load(None, None, **{name: tmp_path / "none"})
        with pytest.raises(ConnectionConfigError, match=f"{name}: there is no file .*none"):
            options.nats_kwargs()

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("creds", "", "holds no NATS user JWT"),
            ("creds", CREDS.replace("SUAM", "SAAM"), "holds no user seed"),
            ("nkey", "SAAM", "holds no user seed"),
            ("tls_ca", "", "holds no certificate in PEM form"),
            ("tls_ca", "no certificate", "holds no certificate in PEM form"),
        ],
    )
    def test_of_the_wrong_kind(self, name: str, text: str, message: str, tmp_path: Path) -> None:
        options = load(None, None, **{name: write(tmp_path / "file", text)})
        with pytest.raises(ConnectionConfigError, match=f"{name}: .*{message}"):
            options.nats_kwargs()

    def test_key_and_certificate_that_do_not_match(self, tmp_path: Path) -> None:
        options = with_certificates(tmp_path)
        other = with_certificates(tmp_path / "other")
        with pytest.raises(ConnectionConfigError, match="are no matching PEM pair"):
            replace(options, tls_key=other.tls_key).nats_kwargs()
        with pytest.raises(ConnectionConfigError, match="tls_key: there is no file"):
            replace(options, tls_key=tmp_path / "none").nats_kwargs()

    def test_an_encrypted_key_does_not_ask_on_the_terminal(self, tmp_path: Path) -> None:
        serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
        options = with_certificates(tmp_path)
        assert options.tls_key is not None
        key = serialization.load_pem_private_key(options.tls_key.read_bytes(), None)
        options.tls_key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            )
        )
        with pytest.raises(ConnectionConfigError, match="is encrypted"):
            options.nats_kwargs()


def with_certificates(folder: Path) -> ConnectOptions:
    folder.mkdir(exist_ok=True)
    ca = trustme.CA()
    issued = ca.issue_cert("node@bus-kv.example")
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    return ConnectOptions(
        tls_ca=folder / "ca.pem", tls_cert=folder / "cert.pem", tls_key=folder / "key.pem"
    )
