"""recon3d.regularisers"""
