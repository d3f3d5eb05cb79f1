"""Put this folder on PYTHONPATH and the interpreter refuses every connection that leaves the machine.

Loopback and Unix sockets stay open: Jupyter kernels and the tests' own servers live there.
"""
import ipaddress
import socket


def _is_local(host) -> bool:
    if host in ("", "localhost", None):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name that would have to be looked up
        return False


def _refuse(host) -> OSError:
    return OSError(f"the network is off in this run: {host!r} was asked for")


def _guard(connect):
    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
            raise _refuse(address[0])
        return connect(self, address)

    return guarded


_getaddrinfo = socket.getaddrinfo


def _guarded_getaddrinfo(host, *args, **kwargs):
    if not _is_local(host.decode() if isinstance(host, bytes) else host):
        raise _refuse(host)
    return _getaddrinfo(host, *args, **kwargs)


socket.getaddrinfo = _guarded_getaddrinfo
socket.socket.connect = _guard(socket.socket.connect)
socket.socket.connect_ex = _guard(socket.socket.connect_ex)
