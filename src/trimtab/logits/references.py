"""Where `trimtab.models.references` used to be: scripts that ask what is fetched from the hub keep working."""

from trimtab.models.references import HUB_FILES as HUB_FILES
