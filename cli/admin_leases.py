"""`baton admin leases`: who pins which KV for whom, and ending what nobody wants any more."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, Parameter

from baton.cli.flags import AdminFlag, JsonFlag
from baton.cli.terminal import counted, human_bytes, human_seconds, show_json, show_table, tell
from baton.client.admin import DEFAULT_ADMIN, AdminClient
from baton.client.replies import Lease
from baton.common.errors import InvalidRequest, UnknownRequest

# A verb and the name of a group at once.
leases = App(name="leases", help="Who pins KV for whom.", version_flags=[])


@leases.default
def list_leases(*, admin: AdminFlag = DEFAULT_ADMIN, as_json: JsonFlag = False) -> None:
    """Every lease of every live worker: who pins which bytes for whom, the oldest first."""

    async def ask() -> list[Lease]:
        async with AdminClient(admin) as client:
            return await client.leases()

    _show(asyncio.run(ask()), as_json)


@leases.command(name="reap")
def reap_leases(
    *ids: Annotated[
        str, Parameter(help="TRANSFER/ATTEMPT as the table shows it, or its beginning")
    ],
    admin: AdminFlag = DEFAULT_ADMIN,
    dry_run: Annotated[bool, Parameter(negative="", help="say which, and end none")] = False,
    as_json: JsonFlag = False,
) -> None:
    """End leases at once. Without IDs: those of this router whose request it no longer knows."""

    async def reap() -> list[Lease]:
        async with AdminClient(admin) as client:
            wanted = pick(await client.leases(), ids) if ids else None
            return await client.reap(wanted, dry_run=dry_run)

    reaped = asyncio.run(reap())
    _show(reaped, as_json)
    tell(f"{counted(len(reaped), 'lease')} {'would be' if dry_run else 'told to be'} ended")


def pick(found: Sequence[Lease], ids: Sequence[str]) -> list[Lease]:
    """The leases with these ids or beginnings of ids, each once.

    UnknownRequest: none begins so. InvalidRequest: several do.
    """
    picked: dict[str, Lease] = {}
    for wanted in ids:
        matches = [lease for lease in found if lease.id == wanted] or [
            lease for lease in found if wanted and lease.id.startswith(wanted)
        ]
        if not matches:
            raise UnknownRequest(f"no lease begins with {wanted!r}; `baton admin leases` shows all")
        if len({lease.id for lease in matches}) > 1:
            raise InvalidRequest(
                f"{len(matches)} leases begin with {wanted!r}: "
                f"{', '.join(lease.id for lease in matches)}; write more of the one"
            )
        picked[matches[0].id] = matches[0]
    return list(picked.values())


def _show(rows: Sequence[Lease], as_json: bool) -> None:
    if as_json:
        show_json(rows)
        return
    show_table(
        (
            "lease",
            "owner",
            "reader",
            "router",
            "request",
            "blocks",
            "bytes",
            "age",
            "expires",
            "state",
            "why",
        ),
        [
            (
                lease.id,
                lease.owner,
                lease.reader,
                lease.router,
                lease.request_id,
                lease.blocks,
                human_bytes(lease.bytes),
                human_seconds(lease.age_s),
                human_seconds(lease.expires_in_s),
                lease.state,
                lease.why,
            )
            for lease in rows
        ],
    )
