"""Flags that several verbs share."""

from typing import Annotated

from cyclopts import Parameter

JsonFlag = Annotated[bool, Parameter(name="--json", negative="", help="JSON on stdout")]
RouterFlag = Annotated[str, Parameter(help="HOST:PORT of a router's gRPC service")]
WorkerArgument = Annotated[
    str, Parameter(name="ID", help="the worker's id, as `workers list` shows it")
]
AdminFlag = Annotated[str, Parameter(help="HOST:PORT of a router's admin service")]
