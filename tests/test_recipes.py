"""Recipes are data: every key checked, every recipe with its provenance, published values apart from the defaults."""

from __future__ import annotations

import json

import pytest

from recon3d.config import ConfigError, load_config
from recon3d.engine.assemble import levels
from recon3d.recipes import Recipe, load_recipe, recipe_names, recipe_schema


def test_the_packaged_recipes():
    ct = {"ct", "dds", "dds_iscs", "dds_tv", "diffusionmbir"}
    pet = {"pet", "pet_dds", "pet_dps", "pet_ls", "pet_naive"}
    mri = {"mri", "ddnm_mri", "dds_mri", "dds_mri_tv", "score_mri"}
    images = {"image", "ddnm", "ddnm_plus", "dps_image", "ilvr"}
    assert set(recipe_names()) == ct | pet | mri | images | {"posterior", "sample"}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_where_it_comes_from(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.title and recipe.provenance.paper and recipe.provenance.protocol
    assert recipe.compat == "corrected"
    if recipe.published:
        assert recipe.provenance.arxiv and len(recipe.provenance.differs) > 100
    else:
        assert name in ("ct", "image", "mri", "pet", "pet_ls", "posterior", "sample")


@pytest.mark.parametrize("name", recipe_names())
def test_every_published_value_is_another_than_the_default(name):
    recipe = load_recipe(name)
    published = load_recipe(name, {"compat": "published"}).resolved() if recipe.published else recipe
    for key, value in recipe.published.items():
        section, field = key.split(".")
        assert getattr(getattr(recipe, section), field) != value, f"{key} says nothing new"
        assert getattr(getattr(published, section), field) == value


@pytest.mark.parametrize("name", recipe_names())
def test_round_trip_and_levels(name):
    recipe = load_recipe(name)
    again = Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json"))))
    assert again == recipe
    trajectory = levels(recipe.trajectory, 0.0193)
    assert trajectory[-1].last and trajectory[-1].sigma_next == 0 and not any(x.last for x in trajectory[:-1])
    assert [x.index for x in trajectory] == list(range(len(trajectory)))


def test_defaults_stay_in_the_packaged_priors_range():
    for name in recipe_names():
        section = load_recipe(name).trajectory
        sigmas = [x.sigma for x in levels(section, 1.0)]
        assert max(sigmas) <= 4.0 and min(sigmas) >= 0.003, name


def test_schema_is_plain_json_and_closed():
    schema = json.loads(json.dumps(recipe_schema()))
    assert schema["additionalProperties"] is False
    assert all(part.get("additionalProperties") is False for part in schema["$defs"].values())
    described = schema["$defs"]["ConsistencySection"]["properties"]
    assert "conjugate-gradient" in described["iterations"]["description"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"consistency.iteration": 3}, "did you mean iterations"),
        ({"consistency.iterations": 0}, "consistency.iterations"),
        ({"consistency.iterations": "many"}, "consistency.iterations"),
        ({"renoise.eta": 1.2}, "renoise.eta"),
        ({"renoise.convention": "ddim"}, "renoise.convention"),
        ({"trajectory.grid": "explicit"}, "sigmas"),
        ({"trajectory.sigma_min": 5.0}, "sigma_min must be below"),
        ({"consistency.kind": "conditional"}, "belong together"),
        ({"trajectory.grid": "sweeps"}, "belong together"),
        ({"trajectory.polish": 0.5}, "polish goes with .* below them, got 0.5"),
        ({"trajectory.polish": 0.01, "trajectory.travel_repeats": 1}, "plain steps"),
        ({"trajectory.polish": 0.01, "renoise.kind": "heun"}, "polish"),
        ({"trajectory.polish": 0.01, "consistency.finish": "sirt"}, "without the data"),
        ({"regulariser.kind": "tvz", "consistency.kind": "projection"}, "tvz needs"),
        ({"claims": "posterior_sample", "noise.kind": "iscs_mm"}, "independent noise"),
        ({"renoise.kind": "ancestral", "renoise.variance": "prior"}, "prior_std"),
        ({"published": {"consistency.rhoo": 1.0}}, "unknown key consistency.rhoo"),
        ({"name.x": 1}, "has no keys"),
        ({"trajectory.sigma_max": float("nan")}, "sigma_max"),
    ],
)
def test_a_mistake_gets_one_sentence(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe("dds", overrides)
    assert "\n" not in str(caught.value)


def test_unknown_recipe():
    with pytest.raises(ConfigError, match="not one of ct, ddnm, ddnm_mri, ddnm_plus, dds"):
        load_recipe("ddss")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe("/nowhere/mine.yaml")


def test_published_values_that_contradict_are_refused():
    with pytest.raises(ConfigError, match="iterations"):
        load_recipe("dds", {"compat": "published", "published": {"consistency.iterations": -1}}).resolved()


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntrajectory: {levels: 7}\n")
    assert load_recipe(path).trajectory.levels == 7 and load_recipe(path).consistency.kind == "proximal_cg"


def test_job_files_override_recipes_key_by_key():
    config = load_config(None, ["recipe=dds", "recipe.consistency.iterations=9", "recipe.compat=published"])
    recipe = Recipe.model_validate(config.recipe)
    assert recipe.consistency.iterations == 9 and recipe.resolved().trajectory.grid == "vp"
