"""Channel and server options of every Baton gRPC endpoint, and why each is there."""

from typing import Any, Final

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024

ChannelOptions = list[tuple[str, Any]]

# Keepalive alone notices a frozen peer only after 60 s; the ping timeout makes it 6 s. Not less: a
# worker is dead after 6 s of silence, and a shorter pause must not break the stream before that.
_KEEPALIVE: Final[ChannelOptions] = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 6_000),
    ("grpc.http2.ping_timeout_ms", 6_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]

# For control streams, on the side that receives: 64 KiB on their way instead of the megabytes that
# probing for bandwidth arrives at (measured on loopback: 6 MiB to a reader that has stopped). What
# waits then waits where it is bounded, joined, and overtaken by what is urgent.
STREAM_WINDOW: Final[ChannelOptions] = [("grpc.http2.bdp_probe", 0)]


def channel_options() -> ChannelOptions:
    return [
        *_KEEPALIVE,
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A channel of its own per peer: no head-of-line blocking behind another's flow control.
        ("grpc.use_local_subchannel_pool", 1),
        # Loopback and cluster addresses never go through an HTTP proxy.
        ("grpc.enable_http_proxy", 0),
        # A worker that restarts is found again within a second.
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
    ]


def server_options() -> ChannelOptions:
    return [
        *_KEEPALIVE,
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # Below the client's ping interval; the default would answer "too many pings".
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        # Two processes must never share a port in silence.
        ("grpc.so_reuseport", 0),
    ]
