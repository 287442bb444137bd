"""How sparsity is spread over layers: counts that are exact to one weight, rules, and what they measure."""
