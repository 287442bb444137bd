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


def nearest(column: torch.Tensor, scale: torch.Tensor, largest: int) -> torch.Tensor:
    """Every weight at the nearest whole multiple of its scale, at most `largest` of them; halves go to even ones."""
    points = torch.arange(-largest, largest + 1, dtype=torch.float64)
    grid = points * scale[:, None]
    distance = (column[:, None] - grid).abs()
    return grid.gather(1, (distance + 1e-12 * (points % 2).abs()).argmin(1, keepdim=True))[:, 0]


def best_scale(rows: torch.Tensor, largest: int, shares, costs: torch.Tensor) -> torch.Tensor:
    """Of the grids that end at these shares of a row's largest weight, the scale whose squared errors cost least."""
    scales = []
    for row in rows:
        candidates = []
        for share in shares:
            scale = (share * row.abs().max() / largest).half().double()
            scale = scale if scale > 0 else torch.tensor(1.0, dtype=torch.float64)
            error = (nearest(row, scale.expand(len(row)), largest) - row).square() @ costs
            candidates.append((float(error), float(scale)))
        scales.append(min(candidates, key=lambda pair: pair[0])[1])
    return torch.tensor(scales, dtype=torch.float64)


def gptq_obs(
    weight: torch.Tensor, x: torch.Tensor, damping: float, step: int, choose, group: int, largest: int, shares
):
    """
    Optimal Brain Surgeon, one column at a time, left to right, each with a fresh inverse of what is left.

    A column is set to its grid, or zero; `choose(scores, start)` gives the mask of `step` columns.
    """
    h = damped(x, damping)
    rest = weight.clone()
    rest[:, x.square().sum(0) == 0] = 0
    keep, scales = torch.ones_like(weight, dtype=torch.bool), []
    width = weight.shape[1]
    # diag(U)^2 of a column is the first entry of the inverse of what is left when the sweep is there.
    pivots = torch.tensor([float(torch.linalg.inv(h[j:, j:])[0, 0]) for j in range(width)], dtype=torch.float64)

    def mask(start, end):
        return choose(rest[:, start:end] ** 2 / pivots[start:end], start)

    for j in range(width):
        if j % step == 0:
            keep[:, j : j + step] = mask(j, min(j + step, width))
        if j % group == 0:
            end = min(j + group, width)
            # The group as it would be if it were pruned only.
            foreseen, kept = rest.clone(), torch.ones_like(keep)
            for c in range(j, end):
                if (c - j) % min(step, group) == 0:
                    till = min(c + min(step, group), end)
                    kept[:, c:till] = choose(foreseen[:, c:till] ** 2 / pivots[c:till], c)
                gone = foreseen[:, c] * ~kept[:, c]
                inverse = torch.linalg.inv(h[c:, c:])
                foreseen[:, c:] -= torch.outer(gone / inverse[0, 0], inverse[0])
                foreseen[:, c] *= kept[:, c]
            scales.append(best_scale(foreseen[:, j:end], largest, shares, 1 / pivots[j:end]))
        settled = nearest(rest[:, j], scales[-1], largest) * keep[:, j]
        inverse = torch.linalg.inv(h[j:, j:])
        rest[:, j:] -= torch.outer((rest[:, j] - settled) / inverse[0, 0], inverse[0])
        rest[:, j] = settled
    return rest, keep, torch.stack(scales, 1)


def greedy_units(weight: torch.Tensor, x: torch.Tensor, damping: float, width: int, pools: int, removed: int):
    """
    Removes the unit whose loss is least, again and again, each loss from a direct solve for all that would stay.

    The loss of a set is that of the least-squares weights on the features that are left, of the damped objective.
    """
    h = damped(x, damping)
    weight = weight.clone()
    weight[:, x.square().sum(0) == 0] = 0
    units = weight.shape[1] // width
    kept = list(range(units))
    each = units // pools

    def objective(units_kept):
        features = [u * width + i for u in units_kept for i in range(width)]
        solved = torch.zeros_like(weight)
        solved[:, features] = torch.linalg.solve(h[features][:, features], (h @ weight.T)[features]).T
        change = solved - weight
        return float(((change @ h) * change).sum()), solved

    for _ in range(pools * removed):
        full = [sum(u // each == pool for u in kept) == each - removed for pool in range(pools)]
        candidates = [u for u in kept if not full[u // each]]
        losses = [(float(f"{objective([k for k in kept if k != u])[0]:.9g}"), -u) for u in candidates]
        kept.remove(-min(losses)[1])
    mask = torch.zeros(units, dtype=torch.bool)
    mask[kept] = True
    return mask, objective(kept)[1]


def time_steps(model, name: str, batches) -> torch.Tensor:
    """The inputs of a Mamba mixer's `dt_proj`: the leading part of what `x_proj` returns (Gu & Dao 2023)."""
    found: list[torch.Tensor] = []
    rank = model.get_submodule(name).in_features
    projection = model.get_submodule(name.replace("dt_proj", "x_proj"))
    hook = projection.register_forward_hook(lambda _, args, out: found.append(out[..., :rank].reshape(-1, rank)))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    hook.remove()
    return torch.cat(found)


def expert_inputs(model, name: str, batches) -> dict[str, list[torch.Tensor]]:
    """
    What reaches every expert of a module, by running the whole model: real tokens that the router dealt to it.

    The second matrix gets the gated product of the first: SwiGLU, of gpt-oss the clamped one of its model card.
    """
    owner = model.get_submodule(name)
    dealt: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = owner.register_forward_pre_hook(lambda _, args: dealt.append((args[0].clone(), args[1].clone())))
    found: dict[str, list[list[torch.Tensor]]] = {"gate_up_proj": [], "down_proj": []}
    with torch.no_grad():
        for batch in batches:
            dealt.clear()
            model(**(batch if isinstance(batch, dict) else {"input_ids": batch}), use_cache=False)
            (hidden, index), rows, products = dealt[0], [], []
            real = (
                batch["attention_mask"].flatten().bool() if isinstance(batch, dict) else torch.ones(len(hidden)).bool()
            )
            for expert in range(len(owner.gate_up_proj)):
                x = hidden[real & (index == expert).any(-1)]
                if owner.is_transposed:
                    both = x @ owner.gate_up_proj[expert] + owner.gate_up_proj_bias[expert]
                    gate, up = both[:, 0::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
                    product = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                else:
                    gate, up = (x @ owner.gate_up_proj[expert].T).chunk(2, -1)
                    product = torch.nn.functional.silu(gate) * up
                rows.append(x)
                products.append(product)
            found["gate_up_proj"].append(rows)
            found["down_proj"].append(products)
    hook.remove()
    return {kind: [torch.cat(parts) for parts in zip(*each, strict=True)] for kind, each in found.items()}
