"""Slow, independent references in float64, written from the papers' formulas: no code shared with the package."""

import itertools

import torch


def damped(x: torch.Tensor, damping: float) -> torch.Tensor:
    """H from raw inputs (tokens, features); dead features get a diagonal of one."""
    gram = x.double().T @ x.double()
    matrix = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    for j in range(len(gram)):
        if gram[j, j] == 0:
            matrix[j, j] = 1
    return matrix


def keep_by_sorting(scores, kept: int) -> list[bool]:
    """The `kept` best of a flat list; of equal scores the earlier stays."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    chosen = set(order[:kept])
    return [i in chosen for i in range(len(scores))]


def pattern_mask(scores: torch.Tensor, kind: str, **settings) -> torch.Tensor:
    """Masks by sorting: kind is tensor, row, nm, block, rows or columns."""
    out, size = scores.shape
    keep = torch.zeros(out, size, dtype=torch.bool)
    if kind == "tensor":
        removed = round(settings["sparsity"] * out * size)
        return torch.tensor(keep_by_sorting(scores.flatten(), out * size - removed)).view(out, size)
    if kind == "row":
        removed = round(settings["sparsity"] * size)
        return torch.tensor([keep_by_sorting(row, size - removed) for row in scores])
    if kind == "nm":
        n, m = settings["n"], settings["m"]
        for r, g in itertools.product(range(out), range(0, size, m)):
            keep[r, g : g + m] = torch.tensor(keep_by_sorting(scores[r, g : g + m], n))
        return keep
    side_rows, side_columns = {
        "block": (settings.get("size", 1),) * 2,
        "rows": (1, size),
        "columns": (out, 1),
    }[kind]
    tiles = list(itertools.product(range(0, out, side_rows), range(0, size, side_columns)))
    sums = [float(scores[r : r + side_rows, c : c + side_columns].sum()) for r, c in tiles]
    kept = keep_by_sorting(sums, len(tiles) - round(settings["sparsity"] * len(tiles)))
    for (r, c), stays in zip(tiles, kept, strict=True):
        keep[r : r + side_rows, c : c + side_columns] = stays
    return keep


def sparsegpt_obs(weight: torch.Tensor, x: torch.Tensor, damping: float, step: int, choose) -> tuple:
    """Optimal Brain Surgeon, one weight at a time, left to right, each with a fresh inverse.

    For column j the Hessian of the columns not yet passed, F = j.., is inverted anew; a removed weight costs
    `w_j^2 / [H_F^-1]_jj` and changes the others by `-w_j [H_F^-1]_j: / [H_F^-1]_jj`. `choose(scores, start)` gives
    the mask of the `step` columns from `start` on.
    """
    matrix = damped(x, damping)
    weight = weight.double().clone()
    weight[:, (x.double().square().sum(0) == 0)] = 0
    out, size = weight.shape
    keep = torch.zeros(out, size, dtype=torch.bool)
    inverses = [torch.linalg.inv(matrix[j:, j:]) for j in range(size)]
    for j in range(size):
        if j % step == 0:
            end = min(j + step, size)
            scores = torch.stack([weight[:, c] ** 2 / inverses[c][0, 0] for c in range(j, end)], 1)
            keep[:, j:end] = choose(scores, j)
        inverse = inverses[j]
        for r in range(out):
            if not keep[r, j]:
                weight[r, j:] -= weight[r, j] * inverse[0] / inverse[0, 0]
                weight[r, j] = 0
    return weight, keep


def sparsegpt_columns(weight: torch.Tensor, factor: torch.Tensor, pattern, block: int, rank_one: int = 0) -> tuple:
    """SparseGPT's sweep as it is usually written: a loop over columns, each a rank-1 update of what is right of it.

    Takes the factor `U` of `H^-1 = U^T U`. `rank_one` columns are updated at once; 0: all that are left. With the
    block's width it is the form of the authors' code, which updates the columns right of the block in one product.
    """
    weight = weight.clone()
    keep = torch.zeros_like(weight, dtype=torch.bool)
    diagonal, size = factor.diagonal(), weight.shape[1]
    step = getattr(pattern, "m", block)
    for a in range(0, size, block):
        b = min(a + block, size)
        errors = torch.zeros_like(weight[:, a:b])
        for j in range(a, b):
            if (j - a) % step == 0:
                e = min(j + step, b)
                keep[:, j:e] = pattern.keep(weight[:, j:e] ** 2 / diagonal[j:e] ** 2, start=j)
            kept = torch.where(keep[:, j], weight[:, j], 0)
            errors[:, j - a] = (weight[:, j] - kept) / factor[j, j]
            right = size if rank_one == 0 else b
            weight[:, j:right] -= errors[:, j - a, None] * factor[j, j:right]
            weight[:, j] = kept
        if rank_one:
            weight[:, b:] -= errors @ factor[a:b, b:]
    return weight, keep


def removal_loss(weight: torch.Tensor, inverse: torch.Tensor, kept: tuple[int, ...]) -> float:
    """`w_P [(H^-1)_PP]^-1 w_P^T` for a group of weights of which only `kept` stay."""
    removed = [j for j in range(len(weight)) if j not in kept]
    part = inverse[removed][:, removed]
    return float(weight[removed] @ torch.linalg.inv(part) @ weight[removed])


def best_subsets(weight: torch.Tensor, inverse: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The n of every m weights to keep so that `removal_loss` is least; of equal ones the first."""
    keep = torch.zeros_like(weight, dtype=torch.bool)
    for r, a in itertools.product(range(len(weight)), range(0, weight.shape[1], m)):
        block = slice(a, a + m)
        subsets = list(itertools.combinations(range(m), n))
        losses = [removal_loss(weight[r, block], inverse[block, block], kept) for kept in subsets]
        for j in subsets[losses.index(min(losses))]:
            keep[r, a + j] = True
    return keep


def admm_mask(weight, x, damping, keep, choose, penalties, steps) -> torch.Tensor:
    """ADMM from the exact solution for `keep` and its multipliers, in variables that give H a unit diagonal.

    min (X - W) S (X - W)^T / 2 subject to X = D, D sparse, with the augmented Lagrangian of the textbook:
    X = argmin, D = the largest of X + V / rho, V = V + rho (X - D).
    """
    matrix = damped(x, damping)
    unit = matrix.diagonal().sqrt()
    scaled, target = matrix / unit[:, None] / unit, weight.double() * unit
    sparse = least_squares(weight, x, damping, keep) * unit
    dual = ((target - sparse) @ scaled).masked_fill(keep, 0)
    for rho in penalties:
        for _ in range(steps):
            free = torch.linalg.solve(
                scaled + rho * torch.eye(len(scaled), dtype=torch.float64), (target @ scaled - dual + rho * sparse).T
            ).T
            keep = choose((free + dual / rho) ** 2)
            sparse = (free + dual / rho) * keep
            dual = dual + rho * (free - sparse)
    return keep


def least_squares(weight: torch.Tensor, x: torch.Tensor, damping: float, keep: torch.Tensor) -> torch.Tensor:
    """Row by row, the minimum of `(w - dense) H (w - dense)^T` over the kept weights, by a direct solve."""
    matrix = damped(x, damping)
    weight = weight.double().clone()
    weight[:, (x.double().square().sum(0) == 0)] = 0
    solved = torch.zeros_like(weight)
    for r in range(len(weight)):
        kept = keep[r].nonzero()[:, 0]
        if len(kept):
            solved[r, kept] = torch.linalg.solve(matrix[kept][:, kept], (matrix @ weight[r])[kept])
    return solved


def output_error(dense: torch.Tensor, pruned: torch.Tensor, x: torch.Tensor) -> float:
    """Squared error of the layer's output, from the raw inputs."""
    return float((x.double() @ (pruned.double() - dense.double()).T).square().sum())


def layer_inputs(model, names: list[str], batches) -> dict[str, torch.Tensor]:
    """The inputs of the named layers, gathered by running the whole model: (tokens, features) each."""
    gathered: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: gathered[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**(batch if isinstance(batch, dict) else {"input_ids": batch}), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs) for name, inputs in gathered.items()}
