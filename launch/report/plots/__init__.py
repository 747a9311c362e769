"""The pictures: what one is (canvas), curves over seeds (curves), a file for each subject, the list of all (menu)."""
