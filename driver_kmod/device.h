/* SPDX-License-Identifier: GPL-2.0-only */
/* A device: its parts, one for each thing that its queues do. */
#ifndef VBW_DEVICE_H
#define VBW_DEVICE_H

#include "balloon.h"
#include "hinting.h"
#include "reporting.h"
#include "session.h"
#include "stats.h"
#include "work.h"

/**
 * struct vbw_device - a device
 * @shared: what the parts share
 * @hint_wq: for hinting, whose rounds may wait for the host
 * @walk_wq: for rounds of the walk queue
 * @balloon: inflating and deflating
 * @stats: memory statistics
 * @reporting: free page reporting
 * @hinting: free page hinting
 * @session: the walk queue
 * @walk_vq: its queue, or NULL
 * @debugfs: its folder
 */
struct vbw_device {
	struct vbw_shared shared;
	struct workqueue_struct *hint_wq;
	struct workqueue_struct *walk_wq;
	struct vbw_balloon balloon;
	struct vbw_stats stats;
	struct vbw_reporting reporting;
	struct vbw_hinting hinting;
	struct vbw_session session;
	struct virtqueue *walk_vq;
	struct dentry *debugfs;
};

extern struct virtio_driver vbw_driver;

#endif /* VBW_DEVICE_H */
