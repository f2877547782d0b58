"""Recipes: published methods and the recommended default as data, one choice per part of the loop.

A recipe is a YAML file beside this module. It names the paper and the protocol it reproduces, and where it differs.
Every strength is dimensionless or in the prior's network units, so it carries over to other scanners and priors.
The values are the corrected ones; `published` lists, key by key, what the published code does instead, and
`compat: published` puts those values in.
"""

from recon3d.recipes.model import Recipe, load_recipe, recipe_from, recipe_names, recipe_schema

__all__ = ["Recipe", "load_recipe", "recipe_from", "recipe_names", "recipe_schema"]
