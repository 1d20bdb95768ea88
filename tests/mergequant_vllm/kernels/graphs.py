"""A backend of torch.compile that keeps what it is handed and runs it as it is."""

import torch


class GraphKeeper:
    """Give it to torch.compile as the backend.

    Attributes:
        graphs: each graph that the compiler made, in order.
    """

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        self.graphs.append(graph)
        return graph

    def calls(self) -> list[str]:
        """Names of the functions that the first graph calls, in order."""
        nodes = self.graphs[0].graph.nodes
        return [str(node.target) for node in nodes if node.op == "call_function"]
