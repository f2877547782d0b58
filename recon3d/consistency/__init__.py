"""recon3d.consistency"""
