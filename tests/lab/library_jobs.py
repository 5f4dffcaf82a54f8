"""What people run on Ray, from one driver: each job spans the three nodes and says what came of it.

Usage: python library_jobs.py NAME... Run by Ray's own Python on a machine of the lab; the jobs are
done one after another. Prints a JSON line for each: `{"library": NAME, "seconds": …}` with what it
found, `hosts` above all, those that its ranks ran on; or with `error`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ray

PATIENCE = 90.0
"""Seconds after which a job has failed: most libraries wait for ever by themselves."""
HTTP, GRPC = 8000, 9000
"""Serve's ports, on every node."""
FAST = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
}
"""What `serve_fast` needs in the environment of all of Serve's processes, and of its driver."""

Found = dict[str, Any]


def nodes() -> list[str]:
    """The addresses of all nodes, the head's first."""
    return sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])


def on_each_node(actor: type) -> list[Any]:
    """One actor of that class on each node.

    They take no processor: a group of collectives keeps its actors, and Ray Data wants whole ones.
    """
    remote: Any = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)(actor)
    return [remote.options(resources={f"node:{a}": 0.01}).remote() for a in nodes()]


def get(references: Any) -> Any:
    return ray.get(references, timeout=PATIENCE)


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class Told:
    """Hears from every rank of a trainer: Ray Train itself passes on what rank 0 reports."""

    def __init__(self) -> None:
        self.ranks: dict[int, Found] = {}

    def tell(self, rank: int, said: Found) -> None:
        self.ranks[rank] = said

    def all(self) -> list[Found]:
        return [self.ranks[rank] for rank in sorted(self.ranks)]


def trained(trainer: type, loop: Callable[[Found], None]) -> Found:
    """Run a trainer of Ray Train with a rank on each node; what the ranks told."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    told: Any = ray.remote(num_cpus=0)(Told).remote()
    made: Any = trainer
    made(
        loop,
        train_loop_config={"told": told},
        scaling_config=ScalingConfig(num_workers=3, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            storage_path=tempfile.gettempdir(), failure_config=FailureConfig(max_failures=0)
        ),
    ).fit()
    ranks = get(told.all.remote())
    return {"hosts": [rank.pop("host") for rank in ranks], "ranks": ranks}


def train_torch() -> Found:
    """TorchTrainer: DDP by gloo, a TCPStore of rank 0's."""
    from ray.train.torch import TorchTrainer

    def loop(config: Found) -> None:
        import ray.train.torch
        import torch
        import torch.distributed as dist

        rank = ray.train.get_context().get_world_rank()
        torch.manual_seed(rank)
        model = ray.train.torch.prepare_model(torch.nn.Linear(64, 64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(32, 64)).square().mean().backward()
            optimizer.step()
        total = torch.tensor([float(rank)])
        dist.all_reduce(total)
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
        said = {"host": socket.gethostname(), "model": digest.hexdigest(), "sum": float(total)}
        ray.get(config["told"].tell.remote(rank, said))

    return trained(TorchTrainer, loop)


def xgboost() -> Found:
    """XGBoostTrainer: its tracker beside rank 0, a ring between the ranks."""
    from ray.train.xgboost import XGBoostTrainer

    def loop(config: Found) -> None:
        import numpy as np
        import ray.train
        import xgboost

        rank = ray.train.get_context().get_world_rank()
        rows = np.random.default_rng(rank).normal(size=(500, 4))
        data = xgboost.DMatrix(rows, label=rows[:, 0] + rank)
        evals: Found = {}
        booster = xgboost.train(
            {"objective": "reg:squarederror", "nthread": 1},
            data,
            num_boost_round=5,
            evals=[(data, "all")],
            evals_result=evals,
            verbose_eval=False,
        )
        digest = hashlib.sha256(bytes(booster.save_raw("json"))).hexdigest()
        said = {"host": socket.gethostname(), "model": digest, "rmse": evals["all"]["rmse"]}
        ray.get(config["told"].tell.remote(rank, said))

    return trained(XGBoostTrainer, loop)


def lightgbm(told_rank: bool = False) -> Found:
    """LightGBMTrainer: every rank listens and dials all others. `told_rank`: it does not look for
    its own address among those of the machine's interfaces, to know which rank it is."""
    from ray.train.lightgbm import LightGBMTrainer

    def loop(config: Found) -> None:
        import lightgbm
        import numpy as np
        import ray.train
        from ray.train.lightgbm import get_network_params

        rank = ray.train.get_context().get_world_rank()
        rows = np.random.default_rng(rank).normal(size=(500, 4))
        network = get_network_params()
        if told_rank:
            network["machines"] += f",rank={rank}"
        few = {"num_threads": 1, "verbose": -1, "pre_partition": True}
        booster = lightgbm.train(
            {"objective": "regression", "tree_learner": "data", **few, **network},
            lightgbm.Dataset(rows, label=rows[:, 0] + rank),
            num_boost_round=5,
        )
        # The parameters at the model's end have each rank's own port.
        model = booster.model_to_string().partition("\nparameters:")[0]
        digest = hashlib.sha256(model.encode()).hexdigest()
        said = {"host": socket.gethostname(), "model": digest, "peers": network["num_machines"]}
        ray.get(config["told"].tell.remote(rank, said))

    return trained(LightGBMTrainer, loop)


def jax() -> Found:
    """JAX's coordinator on one node, and a sum over all processes by its CPU collectives."""

    class Process:
        def place(self) -> str:
            address = ray.util.get_node_ip_address()
            return f"{address}:{free_port(address)}"

        def sum(self, coordinator: str, size: int, rank: int) -> tuple[str, int, list[float]]:
            import jax
            import numpy as np
            from jax.experimental import multihost_utils

            jax.config.update("jax_platforms", "cpu")
            jax.distributed.initialize(coordinator, size, rank, initialization_timeout=60)
            every = multihost_utils.process_allgather(np.array([float(rank)]))
            found = socket.gethostname(), jax.process_count(), np.ravel(every).tolist()
            jax.distributed.shutdown()
            return found

    processes = on_each_node(Process)
    coordinator = get(processes[0].place.remote())
    size = len(processes)
    found = get([p.sum.remote(coordinator, size, rank) for rank, p in enumerate(processes)])
    hosts, counts, gathered = zip(*found, strict=True)
    return {"hosts": hosts, "counts": counts, "gathered": gathered}


def collective() -> Found:
    """ray.util.collective with gloo, and a tensor that goes by it from actor to actor (RDT)."""
    from ray.experimental.collective import create_collective_group

    class Member:
        def sum(self, group: str, number: float) -> tuple[str, float]:
            import torch
            from ray.util import collective

            tensor = torch.tensor([number])
            collective.allreduce(tensor, group_name=group)
            return socket.gethostname(), float(tensor[0])

        @ray.method(tensor_transport="gloo")  # type: ignore[untyped-decorator]
        def make(self) -> Any:
            import torch

            return torch.arange(1000, dtype=torch.float32)

        def total(self, tensor: Any) -> float:
            return float(tensor.sum())

    members = on_each_node(Member)
    group = create_collective_group(members, backend="gloo", name="all").name
    found = get([m.sum.remote(group, float(i)) for i, m in enumerate(members)])
    hosts, sums = zip(*found, strict=True)
    passed = get(members[1].total.remote(members[0].make.remote()))
    return {"hosts": hosts, "sums": sums, "passed": passed}


def torch_rpc() -> Found:
    """torch.distributed.rpc (TensorPipe): every rank calls every other one, and a rendezvous by
    torch's own variables, as torchrun sets them."""

    class Member:
        def place(self) -> tuple[str, int]:
            address = ray.util.get_node_ip_address()
            return address, free_port(address)

        def call_all(self, master: tuple[str, int], rank: int, size: int) -> list[str]:
            from torch.distributed import rpc

            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = master[0], str(master[1])
            rpc.init_rpc(f"rank-{rank}", rank=rank, world_size=size)
            calls = [rpc.rpc_async(f"rank-{to}", socket.gethostname) for to in range(size)]
            hosts = [call.wait() for call in calls]
            rpc.shutdown()
            return hosts

    members = on_each_node(Member)
    master = get(members[0].place.remote())
    size = len(members)
    heard = get([m.call_all.remote(master, rank, size) for rank, m in enumerate(members)])
    return {"hosts": heard[0], "heard": heard}


def serve() -> Found:
    """A proxy on every node, HTTP and gRPC, each asked from this driver's machine."""
    import grpc
    from ray import serve
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    class Greeting:
        def __call__(self, request: Any) -> Any:
            if hasattr(request, "query_params"):
                return socket.gethostname()
            return serve_pb2.UserDefinedResponse(greeting=socket.gethostname())

    def by_http(address: str) -> str:
        with urllib.request.urlopen(f"http://{address}:{HTTP}/", timeout=30) as reply:
            return str(reply.read().decode())

    def by_grpc(address: str) -> str:
        with grpc.insecure_channel(f"{address}:{GRPC}") as channel:
            call = serve_pb2_grpc.UserDefinedServiceStub(channel).__call__
            message = serve_pb2.UserDefinedMessage(name="x", num=1, foo="y")
            said = call(message, metadata=(("application", "default"),), timeout=30)
            return str(said.greeting)

    def answers(ask: Callable[[str], str]) -> list[str]:
        """Of every node's proxy, when it has begun: it is no part of what `run` waits for."""
        found, end = set(), time.monotonic() + PATIENCE
        for address in nodes():
            times = 0
            while times < 12:
                try:
                    found.add(ask(address))
                    times += 1
                except (OSError, grpc.RpcError):
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.2)
        return sorted(found)

    servicer = "ray.serve.generated.serve_pb2_grpc.add_UserDefinedServiceServicer_to_server"
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": "0.0.0.0", "port": HTTP},
        grpc_options={"port": GRPC, "grpc_servicer_functions": [servicer]},
    )
    options: Any = {"max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 0}}
    deployment: Any = serve.deployment(num_replicas=3, **options)(Greeting)
    try:
        serve.run(deployment.bind())
        return {"hosts": answers(by_http), "grpc": answers(by_grpc)}
    finally:
        serve.shutdown()


def serve_fast() -> Found:
    """Serve's high-throughput modes: an HAProxy on every node dials replicas on ports of their own
    (30000 and more), and deployments call each other by gRPC on ports that the kernel chooses."""
    from ray import serve

    class Back:
        def __call__(self) -> str:
            return socket.gethostname()

    class Front:
        def __init__(self, back: Any) -> None:
            self.back = back

        async def __call__(self, request: Any) -> str:
            return f"{socket.gethostname()} {await self.back.remote()}"

    def ask(address: str) -> str:
        with urllib.request.urlopen(f"http://{address}:{HTTP}/", timeout=30) as reply:
            return str(reply.read().decode())

    def answers(address: str) -> set[str]:
        """Until replicas on every node have answered by this node's HAProxy."""
        found: set[str] = set()
        end = time.monotonic() + PATIENCE
        while len(found) < 9 and time.monotonic() < end:
            try:
                found.add(ask(address))
            except OSError:
                time.sleep(0.2)
        return found

    serve.start(proxy_location="EveryNode", http_options={"host": "0.0.0.0", "port": HTTP})
    options: Any = {"max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 0}}
    back: Any = serve.deployment(num_replicas=3, **options)(Back)
    front: Any = serve.deployment(num_replicas=3, **options)(Front)
    try:
        serve.run(front.bind(back.bind()))
        pairs = {address: answers(address) for address in nodes()}
        fronts, backs = ({p.split()[i] for found in pairs.values() for p in found} for i in (0, 1))
        counts = [len(found) for found in pairs.values()]
        return {"hosts": sorted(fronts), "backs": sorted(backs), "pairs": counts}
    finally:
        serve.shutdown()


def data() -> Found:
    """A shuffle and a group-by of Ray Data, with blocks on all nodes."""
    import numpy as np
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False

    def where(batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.2)  # so that no node does it all
        return {**batch, "host": np.array([socket.gethostname()] * len(batch["id"]))}

    rows = ray.data.range(3_000, override_num_blocks=9).random_shuffle(seed=1)
    spread = rows.map_batches(where).materialize()
    taken = spread.take_all()
    keyed = spread.map_batches(lambda batch: {**batch, "key": batch["id"] % 7})
    sums = {r["key"]: r["sum(id)"] for r in keyed.groupby("key", 7).sum("id").take_all()}
    return {
        "hosts": sorted({row["host"] for row in taken}),
        "sums": [sums[key] for key in sorted(sums)],
        "rows": len({row["id"] for row in taken}),
        "in_order": sum(a["id"] < b["id"] for a, b in pairwise(taken)),
    }


def tune() -> Found:
    """Three trials at once, one a node."""
    from ray import tune

    def trial(config: Found) -> None:
        time.sleep(1)
        tune.report({"score": config["x"] ** 2, "host": socket.gethostname()})

    found = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"x": tune.grid_search([3, 1, 2])},
        tune_config=tune.TuneConfig(metric="score", mode="min"),
        run_config=tune.RunConfig(
            storage_path=tempfile.gettempdir(), verbose=0, failure_config=tune.FailureConfig(0)
        ),
    ).fit()
    hosts = [result.metrics["host"] for result in found if result.metrics]
    best = found.get_best_result()
    return {"hosts": hosts, "best": (best.config or {})["x"], "errors": found.num_errors}


def compiled_graph() -> Found:
    """A chain over three nodes, compiled: every call goes by channels of its own."""
    from ray.dag import InputNode

    class Link:
        def pass_on(self, said: list[Any]) -> list[Any]:
            return [*said, socket.gethostname()]

    first, second, third = on_each_node(Link)
    with InputNode() as given:
        chain = third.pass_on.bind(second.pass_on.bind(first.pass_on.bind(given)))
    compiled = chain.experimental_compile()
    try:
        calls = [ray.get(compiled.execute([number]), timeout=PATIENCE) for number in range(20)]
    finally:
        compiled.teardown()
    return {"hosts": calls[0][1:], "numbers": [call[0] for call in calls]}


def debugger() -> Found:
    """A task on every node waits at a breakpoint, until a client at its port lets it go on."""
    from ray.util.state import list_workers

    def stop_and_go() -> str:
        breakpoint()
        return socket.gethostname()

    task: Any = ray.remote(num_cpus=0, max_retries=0)(stop_and_go)
    waiting = [task.options(resources={f"node:{a}": 0.01}).remote() for a in nodes()]
    end, places = time.monotonic() + 60, set[tuple[str, int]]()
    while len(places) < len(waiting):
        if time.monotonic() > end:
            raise TimeoutError(f"debuggers at {places} only")
        time.sleep(0.2)
        found = list_workers(detail=True, limit=1000)
        places = {(w.ip, w.debugger_port) for w in found if w.is_alive and w.debugger_port}
    for place in places:
        go_on(place)
    return {"hosts": get(waiting), "places": sorted(place[0] for place in places)}


def go_on(place: tuple[str, int]) -> None:
    """Attach to a debugger, wait until it has stopped at the breakpoint, and let it go on."""
    number = 0
    with socket.create_connection(place, timeout=30) as sock, sock.makefile("rb") as said:

        def ask(command: str, **arguments: Any) -> None:
            nonlocal number
            number += 1
            request = {"seq": number, "type": "request", "command": command}
            text = json.dumps({**request, "arguments": arguments}).encode()
            sock.sendall(f"Content-Length: {len(text)}\r\n\r\n".encode() + text)

        def hear(what: str) -> Found:
            while True:
                size = int(said.readline().partition(b":")[2])
                said.readline()
                message: Found = json.loads(said.read(size))
                if what in {message.get("event"), message.get("command")}:
                    return message

        ask("initialize", adapterID="rayfwd")
        hear("initialize")
        ask("attach", justMyCode=False)
        hear("initialized")
        ask("configurationDone")
        stopped = hear("stopped")
        ask("continue", threadId=stopped["body"]["threadId"])
        hear("continue")
        ask("disconnect")
        hear("disconnect")


JOBS: dict[str, Callable[[], Found]] = {
    "train_torch": train_torch,
    "xgboost": xgboost,
    "lightgbm": lightgbm,
    "lightgbm_told_rank": lambda: lightgbm(told_rank=True),
    "jax": jax,
    "collective": collective,
    "torch_rpc": torch_rpc,
    "serve": serve,
    "serve_fast": serve_fast,
    "data": data,
    "tune": tune,
    "compiled_graph": compiled_graph,
    "debugger": debugger,
}


def main(names: list[str]) -> int:
    fast = FAST if "serve_fast" in names else {}
    os.environ.update(fast)
    runtime: Found = {"env_vars": fast} if fast else {}
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR", runtime_env=runtime)
    for name in names:
        began = time.monotonic()
        try:
            line = JOBS[name]()
        except Exception:
            line = {"error": traceback.format_exc()[-6000:]}
        line = {"library": name, "seconds": round(time.monotonic() - began, 1), **line}
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
