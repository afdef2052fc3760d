// SPDX-License-Identifier: GPL-2.0-only
/* Work of a device, and its end. */
#include "work.h"

/**
 * vbw_shared_setup - prepare what the parts of a device share, stopped
 * @shared: to be filled in
 * @vdev: the device
 */
void vbw_shared_setup(struct vbw_shared *shared, struct virtio_device *vdev)
{
	shared->vdev = vdev;
	init_waitqueue_head(&shared->acked);
	spin_lock_init(&shared->lock);
	shared->stop = true;
}

/**
 * vbw_shared_start - allow work
 * @shared: of the device
 */
void vbw_shared_start(struct vbw_shared *shared)
{
	spin_lock_irq(&shared->lock);
	shared->stop = false;
	spin_unlock_irq(&shared->lock);
}

/**
 * vbw_shared_stop - allow no more work, and wake those that wait for the device
 * @shared: of the device
 *
 * Work that was queued before has to be cancelled by those that own it.
 */
void vbw_shared_stop(struct vbw_shared *shared)
{
	spin_lock_irq(&shared->lock);
	WRITE_ONCE(shared->stop, true);
	spin_unlock_irq(&shared->lock);
	wake_up_all(&shared->acked);
}

/**
 * vbw_queue_work - queue work unless the device stops
 * @shared: of the device
 * @wq: the workqueue
 * @work: the work
 *
 * Return: whether it was queued by this call.
 */
bool vbw_queue_work(struct vbw_shared *shared, struct workqueue_struct *wq,
		    struct work_struct *work)
{
	unsigned long flags;
	bool queued = false;

	spin_lock_irqsave(&shared->lock, flags);
	if (!shared->stop)
		queued = queue_work(wq, work);
	spin_unlock_irqrestore(&shared->lock, flags);
	return queued;
}
