/* SPDX-License-Identifier: GPL-2.0-only */
/* What the parts of a device share: the device, its waiters, its work. */
#ifndef VBW_WORK_H
#define VBW_WORK_H

#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>
#include <linux/wait.h>
#include <linux/workqueue.h>

/**
 * struct vbw_shared - what the parts of a device share
 * @vdev: the device
 * @acked: a queue has used a buffer, or the device stops
 * @lock: @stop, against queueing work
 * @stop: the device is going away or to sleep; no work is queued
 */
struct vbw_shared {
	struct virtio_device *vdev;
	wait_queue_head_t acked;
	spinlock_t lock; /* stop, against queueing work */
	bool stop;
};

void vbw_shared_setup(struct vbw_shared *shared, struct virtio_device *vdev);
void vbw_shared_start(struct vbw_shared *shared);
void vbw_shared_stop(struct vbw_shared *shared);
bool vbw_queue_work(struct vbw_shared *shared, struct workqueue_struct *wq,
		    struct work_struct *work);

static inline bool vbw_has(const struct vbw_shared *shared, unsigned int feature)
{
	return virtio_has_feature(shared->vdev, feature);
}

static inline bool vbw_stopping(const struct vbw_shared *shared)
{
	return READ_ONCE(shared->stop);
}

#endif /* VBW_WORK_H */
